"""Data that is broken, gone or odd: told by name, or replaced and counted; never a hang, never a crash."""

import io
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2_ds.data.config import DataConfig
from m2_ds.data.records import SCHEMA, Caption, HardNegative, Record
from m2_ds.data.shards import ShardWriter, open_dataset
from m2_ds.data.stream import PairBatch, build_loader
from m2_ds.data.text_train import train
from tests.support.pairs import ByteTokenizer, make_dataset, record, text_of


def stream(folder: Path, **changes: Any) -> Any:
    base = {"sources": [{"path": folder}], "image_size": 16, "mixing_window": 8, "shuffle_groups": 2, "prefetch": 1}
    base |= {"row_group_cache_mb": 1}
    loader = build_loader(
        DataConfig.model_validate(base | changes), ByteTokenizer(), global_batch=4, micro_batch=4, seed=1
    )
    loader.dataset.splits[0].cache_bytes = 1  # every row group is read when it is needed
    return iter(loader)


def shard(folder: Path, number: int = 1) -> Path:
    return folder / open_dataset(folder).index("train").file(number)


def vanish(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate_in_place(path: Path) -> None:
    """The same file, held open by the reader, shrinks: what was mapped into memory would now kill the process."""
    with open(path, "r+b") as handle:
        handle.truncate(100)


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(b"\x89PNG") + 40
    content[at] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "workers"), [(vanish, 0), (cut, 0), (empty, 0), (truncate_in_place, 0), (corrupt, 0), (vanish, 1)]
)
def test_a_shard_that_breaks_while_it_is_read_is_named(
    tmp_path: Path, harm: Callable[[Path], None], workers: int
) -> None:
    make_dataset(tmp_path, 60)
    batches = stream(tmp_path, workers=workers)
    next(batches)
    for number in range(len(open_dataset(tmp_path).index("train"))):
        harm(shard(tmp_path, number))
    with pytest.raises(ValueError, match=r"train-0000\d\.parquet"):
        for _ in range(60):
            next(batches)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop_columns(["group"]), "columns .* are not those of a data set"),
        (lambda table: table.rename_columns(["id", *SCHEMA.names[1:]]), "columns .* are not those of a data set"),
        (lambda table: table.set_column(2, "width", table["width"].cast(pa.int64())), "'width' is int64, not int32"),
        (lambda table: table.slice(1), "rows in 1 row groups are not those of the manifest"),
    ],
)
def test_a_shard_of_another_schema_is_named(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, 7)
    path = shard(tmp_path, 0)
    size = path.stat().st_size
    pq.write_table(change(pq.read_table(path)), path)
    monkeypatch.setattr("m2_ds.data.store.LocalStore.size", lambda *_: size)  # as if its length were right by chance
    with pytest.raises(ValueError, match=f"{path.name}, row group 0: can't be read .*{words}"):
        open_dataset(tmp_path).split("train").read([0])


def test_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    make_dataset(tmp_path, 7)
    path = shard(tmp_path, 0)
    table = pq.read_table(path)
    bad = pa.array([b"\xff\xfe"] * 7, pa.binary()).view(pa.string())
    table = table.set_column(6, "group", bad)
    size = path.stat().st_size
    pq.write_table(table, path)
    split = open_dataset_unchecked(tmp_path, size)
    with pytest.raises(ValueError, match=rf"{path.name}: .*utf-8.*build this data set again"):
        split.read([0])


def open_dataset_unchecked(folder: Path, size: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2_ds.data.store.LocalStore.size", lambda *_: size)
        split = open_dataset(folder).split("train")
        split.row_groups.store.size = lambda _: size
    return split


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 60,000 x 60,000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


PICTURES = {3: ("picture too large", bomb()), 11: ("broken picture", b"\0"), 17: ("broken picture", b"GIF89a")}
PICTURES[23] = ("broken picture", record(23).image[:-30])


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_cannot_be_used_are_replaced_and_counted(tmp_path: Path, workers: int) -> None:
    make_dataset(
        tmp_path,
        30,
        change=lambda number, made: replace(made, image=PICTURES[number][1]) if number in PICTURES else made,
    )
    config = {"sources": [{"path": tmp_path}], "image_size": 16, "mixing_window": 30, "workers": workers}
    loader = build_loader(DataConfig.model_validate(config), ByteTokenizer(), global_batch=30, micro_batch=30, seed=1)
    (batch,) = islice(loader, 1)
    assert isinstance(batch, PairBatch) and not {f"pair/{number}" for number in PICTURES} & set(batch.keys)
    wanted = Counter(reason for reason, _ in PICTURES.values())
    assert all(batch.skipped[reason] >= count for reason, count in wanted.items())
    assert batch.images.shape[0] == 30


def test_an_empty_picture_in_a_foreign_shard_counts_as_broken(tmp_path: Path) -> None:
    """The writer refuses them; a shard from elsewhere may hold nothing, or null."""
    make_dataset(tmp_path, 7)
    path = shard(tmp_path, 0)
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[2], images[4] = b"", None
    captions = table["captions"].to_pylist()
    captions[5] = None
    table = table.set_column(1, SCHEMA.field("image"), pa.array(images, pa.binary()))
    table = table.set_column(4, SCHEMA.field("captions"), pa.array(captions, SCHEMA.field("captions").type))
    size = path.stat().st_size
    pq.write_table(table, path)
    found = open_dataset_unchecked(tmp_path, size).read(range(7))
    assert [len(one.image) > 0 for one in found] == [True, True, False, True, False, True, True]
    assert found[5].captions == []


@pytest.mark.parametrize(
    "change",
    [
        {"captions": [Caption("a \ud800 dog", "en")]},
        {"captions": [Caption("a dog", "en", 1.0, "\udfff")]},
        {"group": "g\ud83d"},
        {"key": "k\ud83d"},
        {"category": "\ud83d"},
        {"hard_negatives": [HardNegative("\udc00", "en", "x")]},
    ],
)
def test_half_a_surrogate_pair_is_refused_by_key_and_nothing_else_is_lost(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    with ShardWriter(tmp_path, "pair") as writer:
        writer.add("train", record(0))
        with pytest.raises(ValueError, match=r"record '.*': .* is no Unicode text at character \d"):
            writer.add("train", replace(record(1), **change))
        writer.add("train", record(2))
    assert open_dataset(tmp_path).split("train").read([0, 1]) == [record(0), record(2)]


ODD = [
    "nul \0 inside",
    "\u202eright to left",
    "e\u0301\u0301\u0301",
    "👩\u200d👩\u200d👧",
    "\ufeffbom",
    "𠮷野家",
    "\x1b[31mred",
]


def test_odd_text_travels_as_it_is(tmp_path: Path) -> None:
    def odd(number: int, made: Record) -> Record:
        return replace(made, captions=[Caption(ODD[number % len(ODD)], "en")])

    make_dataset(tmp_path / "set", 21, change=odd)
    config = {"sources": [{"path": tmp_path / "set"}], "image_size": 16, "mixing_window": 21, "languages": {"en": 1.0}}
    data = DataConfig.model_validate(config)
    (batch,) = islice(build_loader(data, ByteTokenizer(), global_batch=21, micro_batch=21, seed=0), 1)
    assert Counter(text_of(batch.ids[0, b]) for b in range(21)) == dict.fromkeys(ODD, 3)
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(f"a plain line number {number}" for number in range(300)))
    tokenizer = train(tmp_path / "tokenizer", corpus=(), text=(text,), vocab_size=300, coverage=1.0)
    (batch,) = islice(build_loader(data, tokenizer, global_batch=21, micro_batch=21, seed=0), 1)
    assert batch.mask[:, :, :2].all()


def test_a_truncated_jpeg_is_broken_not_grey(tmp_path: Path) -> None:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "JPEG")

    def change(number: int, made: Record) -> Record:
        return replace(made, image=out.getvalue()[:-40] if number == 0 else made.image)

    make_dataset(tmp_path, 20, change=change)
    config = {"sources": [{"path": tmp_path}], "image_size": 16, "mixing_window": 20}
    (batch,) = islice(
        build_loader(DataConfig.model_validate(config), ByteTokenizer(), global_batch=20, micro_batch=20, seed=0), 1
    )
    assert batch.skipped == {"broken picture": 1}
