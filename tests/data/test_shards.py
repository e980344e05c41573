"""Shards: what was written is read, in any order; what is damaged is refused by name; nothing is half there."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_ds.data.records import SCHEMA
from m2_ds.data.shards import Caption, HardNegative, ShardWriter, open_dataset
from tests.support.pairs import make_dataset, record


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    full = replace(
        record(0), hard_negatives=[HardNegative("a wrong one", "en", "attribute")], category="things", width=12
    )
    with ShardWriter(tmp_path / "set", "pair") as writer:
        writer.add("train", full)
        writer.add("train", record(1))
    assert open_dataset(tmp_path / "set").split("train").read([1, 0, 1]) == [record(1), full, record(1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "set"
    make_dataset(folder, 60, val=5)
    return folder


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 59), max_size=40), cache=st.sampled_from([1, 30_000, 1 << 20]))
def test_any_rows_in_any_order_with_any_cache(folder: Path, rows: list[int], cache: int) -> None:
    split = open_dataset(folder).split("train", cache_bytes=cache)
    assert [found.key for found in split.read(rows)] == [f"pair/{row}" for row in rows]
    # Bounded: over the bound there is one row group and no more.
    assert split._held <= cache or len(split._groups) == 1


def test_several_shards_and_row_groups(folder: Path) -> None:
    split = open_dataset(folder).split("train")
    assert len(split.index) > 2
    assert max(split.group_sizes) == 7
    assert sum(split.group_sizes) == len(split) == 60
    assert split.languages == {"en": 120, "zh": 60}
    assert [row["key"] for row in split.iter(columns=["key"])] == [f"pair/{row}" for row in range(60)]
    with pytest.raises(ValueError, match="no such columns.*picture"):
        next(split.iter(columns=["picture"]))
    with pytest.raises(IndexError, match="60"):
        split.read([60])


def test_a_copy_for_another_process_reads_on(folder: Path) -> None:
    split = open_dataset(folder).split("train")
    split.read([3])
    copy = pickle.loads(pickle.dumps(split))
    assert not copy._groups
    assert copy.read([3]) == split.read([3])


def test_schema_is_the_documented_one(folder: Path) -> None:
    assert SCHEMA.names == [
        *("key", "image", "width", "height", "captions"),
        *("hard_negatives", "group", "category", "source", "license"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": ""}, "empty key"),
        ({"image": b""}, "empty image"),
        ({"captions": []}, "no caption"),
        ({"captions": [Caption(" ", "en")]}, "neither may be empty"),
        ({"captions": [Caption("a", "en", 0.0)]}, "weight 0"),
        ({"group": ""}, "empty group"),
        ({"width": 0}, "size 0"),
    ],
)
def test_unusable_records_are_refused_by_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    writer = ShardWriter(tmp_path, "pair")
    with pytest.raises(ValueError, match=message):
        writer.add("train", replace(record(0), **change))


def test_keys_are_unique_over_splits(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "pair") as writer:
        writer.add("train", record(0))
        with pytest.raises(ValueError, match="pair/0.*used before"):
            writer.add("val", record(0))


def test_a_failed_build_leaves_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "pair", group_rows=2) as writer:
        for number in range(5):
            writer.add("train", record(number))
        raise RuntimeError
    with pytest.raises(ValueError, match="holds no data set"):
        open_dataset(tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))
    assert not list(tmp_path.rglob("*.part"))


def test_an_existing_set_is_kept_unless_overwritten(tmp_path: Path) -> None:
    make_dataset(tmp_path, 30, val=3)
    with pytest.raises(ValueError, match="already holds a data set"):
        ShardWriter(tmp_path, "other")
    with ShardWriter(tmp_path, "other", overwrite=True) as writer:
        writer.add("train", record(0))
    assert open_dataset(tmp_path).splits == ["train"]
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.parquet"))
    assert found == ["manifest.train.parquet", "train/train-00000.parquet"]


def _shard(folder: Path) -> Path:
    return folder / open_dataset(folder).index("train")[1].file


def test_a_missing_or_truncated_shard_is_named_at_opening(tmp_path: Path) -> None:
    make_dataset(tmp_path, 40)
    shard = _shard(tmp_path)
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{shard.name}.*cut short"):
        open_dataset(tmp_path).split("train")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        open_dataset(tmp_path).split("train")


def test_a_changed_byte_is_found_by_verify_and_by_reading(tmp_path: Path) -> None:
    make_dataset(tmp_path, 40)
    assert open_dataset(tmp_path).verify() == len(list(tmp_path.rglob("*-0*.parquet")))
    shard = _shard(tmp_path)
    content = bytearray(shard.read_bytes())
    at = content.index(b"\x89PNG") + 40
    content[at] ^= 0xFF
    shard.write_bytes(content)
    dataset = open_dataset(tmp_path)
    with pytest.raises(ValueError, match=f"{shard.name}: checksum"):
        dataset.verify()
    with pytest.raises(ValueError, match=f"{shard.name}, row group 0: can't be read"):
        dataset.split("train").read(range(40))


def test_a_shard_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    make_dataset(tmp_path, 40)
    shard = _shard(tmp_path)
    shard.write_bytes(os.urandom(shard.stat().st_size))
    with pytest.raises(ValueError, match=shard.name):
        open_dataset(tmp_path).split("train").read(range(40))


def test_a_manifest_of_another_version_or_garbage_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path, 3)
    manifest = tmp_path / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"schema_version": 3}))
    with pytest.raises(ValueError, match="manifest.json: schema_version is 3"):
        open_dataset(tmp_path)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="manifest.json"):
        open_dataset(tmp_path)
    manifest.write_text(json.dumps(content | {"splits": {"train": {"rows": 3}}}))
    with pytest.raises(ValueError, match="splits.train.index"):
        open_dataset(tmp_path)


def test_an_unknown_split_is_answered_with_those_there(folder: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        open_dataset(folder).split("test")
