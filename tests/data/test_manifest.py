"""The manifest and its tables of shards: counts, checksums, older versions, and sizes of real sets."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_ds.data import reader
from m2_ds.data.index import ShardIndex, write_index
from m2_ds.data.order import Order
from m2_ds.data.reader import open_dataset
from m2_ds.data.records import Record, ShardInfo
from tests.support.pairs import make_dataset, record


def shard(number: int, groups: list[int]) -> ShardInfo:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return ShardInfo(
        file=f"train/train-{number:05d}.parquet", rows=sum(groups), row_groups=groups, bytes=1000 + number,
        sha256=digest, footer=number,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(shards=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), max_size=8))
def test_an_index_knows_where_every_row_is(shards: list[list[int]]) -> None:
    infos = [shard(number, groups) for number, groups in enumerate(shards)]
    index = ShardIndex.read(write_index(infos))
    assert list(index) == infos and index[: len(infos)] == infos
    assert write_index(index) == write_index(infos)
    sizes = [size for groups in shards for size in groups]
    assert index.sizes().tolist() == sizes and index.rows == sum(sizes) and index.row_groups == len(sizes)
    numbers = np.arange(len(sizes))
    assert index.sizes(numbers).tolist() == sizes
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    assert index.starts(np.arange(len(sizes) + 1)).tolist() == starts.tolist()
    assert index.groups_of(np.arange(sum(sizes))).tolist() == np.repeat(numbers, sizes).tolist()
    places = [(s, inside) for s, groups in enumerate(shards) for inside in range(len(groups))]
    assert [index.place(group) for group in range(len(sizes))] == places
    copy = pickle.loads(pickle.dumps(index))
    assert list(copy) == infos


def _mixed(number: int, made: Record) -> Record:
    """Sources a and b in turns; every third record of b has no Chinese caption."""
    captions = made.captions[:2] if number % 6 == 1 else made.captions
    return replace(made, source="ab"[number % 2], captions=captions)


def test_counts_by_source_and_language_together(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, 60, change=_mixed).manifest
    info = manifest.splits["train"]
    found = {(count.source, count.language): (count.pairs, count.captions) for count in info.counts}
    assert found == {("a", "en"): (30, 60), ("a", "zh"): (30, 30), ("b", "en"): (30, 60), ("b", "zh"): (20, 20)}
    assert info.languages == {"en": 120, "zh": 50} and info.sources == {"a": 30, "b": 30}


def version_1(folder: Path) -> None:
    """Rewrite a data set's manifest as the first version had it."""
    dataset = open_dataset(folder)
    splits: dict[str, Any] = {
        name: {
            "rows": info.rows,
            "shards": [shard.model_dump(exclude={"footer"}) for shard in dataset.index(name)],
            "languages": info.languages,
            "sources": info.sources,
        }
        for name, info in dataset.manifest.splits.items()
    }
    for file in folder.glob("manifest.*"):
        file.unlink()
    content = {"schema_version": 1, "name": dataset.name, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(content, indent=1))


def test_the_first_version_is_read_as_before(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", 60, val=5)
    shards = list(open_dataset(tmp_path / "set").index("train"))
    version_1(tmp_path / "set")
    dataset = open_dataset(tmp_path / "set")
    assert dataset.splits == ["train", "val"] and dataset.verify() == len(shards) + 1
    assert [replace_footer(found) for found in shards] == list(dataset.index("train"))
    split = dataset.split("train")
    assert split.read([59, 0]) == [record(59), record(0)] and split.languages == {"en": 120, "zh": 60}
    assert dataset.digest == hashlib.sha256((tmp_path / "set" / "manifest.json").read_bytes()).hexdigest()
    # Of an object store, where the footer's length has to be asked for.
    assert open_dataset(f"file://{tmp_path / 'set'}").split("train").read([59, 0]) == [record(59), record(0)]


def replace_footer(info: ShardInfo) -> ShardInfo:
    return info.model_copy(update={"footer": 0})


def test_a_missing_or_changed_table_of_shards_is_named(tmp_path: Path) -> None:
    make_dataset(tmp_path, 30)
    table = tmp_path / "manifest.train.parquet"
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.train\.parquet: checksum .* is not the manifest's"):
        open_dataset(tmp_path).split("train")
    table.unlink()
    with pytest.raises(ValueError, match=r"manifest\.train\.parquet.*fetch or build"):
        open_dataset(tmp_path).split("train")


def test_of_very_many_shards_each_is_looked_at_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", 3)
    make_dataset(tmp_path, 60)
    index = open_dataset(tmp_path).index("train")
    (tmp_path / index.file(1)).unlink()
    cut = tmp_path / index.file(2)
    cut.write_bytes(cut.read_bytes()[:-10])
    split = open_dataset(tmp_path).split("train")
    assert split.read([0]) == [record(0)]
    missing, short = (index[0].rows + offset for offset in (0, index[1].rows))
    with pytest.raises(ValueError, match=f"{Path(index.file(1)).name} is missing"):
        split.read([missing])
    with pytest.raises(ValueError, match=f"{cut.name}.*cut short or replaced"):
        split.read([short])


def test_a_billion_rows_take_little_memory_and_no_list() -> None:
    """4 bytes a row group and 100 a shard, and as much again for the order of an epoch."""
    import tracemalloc

    shards = [shard(number, [256] * 400) for number in range(1000)]
    content = write_index(shards)
    tracemalloc.start()
    index = ShardIndex.read(content)
    order = Order([index], [1.0], seed=0, window=4096, groups=32)
    order(np.arange(64))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.row_groups == 400_000
    assert held < 12 * index.row_groups + 400 * len(shards) + (1 << 20)
    assert len(pickle.dumps(index)) < 5 * index.row_groups + 200 * len(shards)
