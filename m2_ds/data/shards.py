"""Image-text pairs on disk: a folder of Parquet shards with a manifest, written atomically and read at random.

    folder/manifest.json                      what there is: splits, counts by source and language
    folder/manifest.<split>.parquet           rows, row groups, bytes and SHA-256 of every shard
    folder/<split>/<split>-00000.parquet      one row a picture, image bytes as they were found

A file is written aside, synced and renamed; the manifest comes last. A folder without a manifest is not a data set.
"""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from m2_ds.data.index import ShardIndex, write_index
from m2_ds.data.reader import MANIFEST, Dataset, Split, index_info, open_dataset
from m2_ds.data.records import (
    SCHEMA,
    SCHEMA_VERSION,
    Caption,
    Count,
    HardNegative,
    Manifest,
    Record,
    ShardInfo,
    SplitInfo,
)
from m2_ds.data.row_groups import footer_length
from m2_ds.files import publish, sha256, write_atomically

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "Caption",
    "Dataset",
    "HardNegative",
    "Manifest",
    "Record",
    "ShardInfo",
    "ShardWriter",
    "Split",
    "SplitInfo",
    "open_dataset",
    "write_atomically",
]


def _check(record: Record) -> None:
    def refuse(why: str) -> None:
        raise ValueError(f"record {record.key!r}: {why}")

    if not record.key:
        refuse("empty key; give every picture a name that is unique in the data set")
    if not record.image:
        refuse("empty image; leave the record out")
    if record.width < 1 or record.height < 1:
        refuse(f"size {record.width} x {record.height} pixels; both must be at least 1")
    if not record.group:
        refuse("empty group; use the key when every picture stands for itself")
    if not record.captions:
        refuse("no caption; leave the record out")
    for caption in record.captions:
        if not caption.text.strip() or not caption.language:
            refuse(f"caption {caption.text!r} in language {caption.language!r}: neither may be empty")
        if not 0 < caption.weight < float("inf"):
            refuse(f"caption {caption.text!r} has weight {caption.weight}; weights are positive and finite")
    texts = [record.key, record.group, record.source, record.license, record.category or ""]
    described: list[Caption | HardNegative] = [*record.captions, *record.hard_negatives]
    for one in described:
        texts += [one.text, one.language, one.kind]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            refuse(f"{text!r} is no Unicode text at character {error.start} (half a surrogate pair); repair the text")


class _OpenShard:
    """A shard being written: rows wait in memory until they fill a row group."""

    def __init__(self, path: Path, relative: str) -> None:
        self.path, self.relative = path, relative
        self.aside = path.with_name(f".{path.name}.part")
        self.pending: list[Record] = []
        self.pending_bytes = self.bytes = 0
        self.row_groups: list[int] = []
        self.writer = pq.ParquetWriter(
            self.aside,
            SCHEMA,
            # Pictures are compressed already; the other columns shrink by half.
            compression={name: "none" if name == "image" else "zstd" for name in SCHEMA.names},
            use_dictionary=["source", "license", "category"],
            write_statistics=False,
            write_page_checksum=True,
        )

    def flush(self) -> None:
        if self.pending:
            rows = self.pending
            columns = {
                name: [getattr(row, name) for row in rows]
                for name in SCHEMA.names
                if name not in ("captions", "hard_negatives")
            }
            columns["captions"] = [
                [{"text": c.text, "language": c.language, "weight": c.weight, "kind": c.kind} for c in row.captions]
                for row in rows
            ]
            columns["hard_negatives"] = [
                [{"text": n.text, "language": n.language, "kind": n.kind} for n in row.hard_negatives] or None
                for row in rows
            ]
            self.writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=len(rows))
            self.row_groups.append(len(rows))
        self.bytes += self.pending_bytes
        self.pending, self.pending_bytes = [], 0

    def close(self) -> ShardInfo:
        self.flush()
        self.writer.close()
        publish(self.aside, self.path)
        return ShardInfo(
            file=self.relative,
            rows=sum(self.row_groups),
            row_groups=self.row_groups,
            bytes=self.path.stat().st_size,
            sha256=sha256(self.path),
            footer=footer_length(self.path),
        )

    def abandon(self) -> None:
        self.writer.close()
        self.aside.unlink(missing_ok=True)


class ShardWriter:
    """Writes a data set. Use as a context manager: leaving it writes the manifest, an exception leaves none.

    Args:
        folder: where the data set will lie; made if missing. One that holds a data set already is refused, unless
            `overwrite`, which takes the old one away first.
        name: the data set's name, kept in the manifest.
        group_rows, group_bytes: a row group (the unit of random reading and of shuffling) ends at either bound.
        shard_bytes: a shard ends at about this many bytes of pictures and text.
    """

    def __init__(
        self,
        folder: Path | str,
        name: str,
        *,
        overwrite: bool = False,
        group_rows: int = 256,
        group_bytes: int = 4 << 20,
        shard_bytes: int = 256 << 20,
    ) -> None:
        self.folder, self.name = Path(folder), name
        self.group_rows, self.group_bytes, self.shard_bytes = group_rows, group_bytes, shard_bytes
        manifest = self.folder / MANIFEST
        if manifest.exists():
            if not overwrite:
                raise ValueError(f"{self.folder} already holds a data set; choose another folder or overwrite it")
            splits = list(json.loads(manifest.read_text()).get("splits", {}))
            manifest.unlink()
            for split in splits:
                shutil.rmtree(self.folder / split, ignore_errors=True)
                (self.folder / index_file(split)).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open: dict[str, _OpenShard] = {}
        self._shards: dict[str, list[ShardInfo]] = {}
        self._sources: dict[str, Counter[str]] = {}
        self._pairs: dict[str, Counter[tuple[str, str]]] = {}  # by source and language
        self._captions: dict[str, Counter[tuple[str, str]]] = {}
        self._keys: set[int] = set()

    def add(self, split: str, record: Record) -> None:
        """Append one record; a split comes into being with its first record.

        Raises:
            ValueError: a field that no reader could use, or a key that was there before.
        """
        _check(record)
        # 64-bit digests: eight bytes of information a key, so that a hundred million fit in memory.
        digest = int.from_bytes(hashlib.blake2b(record.key.encode(), digest_size=8).digest())
        if digest in self._keys:
            raise ValueError(f"record {record.key!r}: the key was used before; keys are unique in a data set")
        self._keys.add(digest)
        shard = self._open.get(split)
        if shard is None:
            if not split or split.startswith(".") or "/" in split:
                raise ValueError(f"split {split!r} can't be a folder's name")
            shards = self._shards.setdefault(split, [])
            relative = f"{split}/{split}-{len(shards):05d}.parquet"
            path = self.folder / relative
            path.parent.mkdir(exist_ok=True)
            shard = self._open[split] = _OpenShard(path, relative)
        shard.pending.append(record)
        shard.pending_bytes += len(record.image) + sum(len(caption.text) for caption in record.captions)
        cells = [(record.source, caption.language) for caption in record.captions]
        self._captions.setdefault(split, Counter()).update(cells)
        self._pairs.setdefault(split, Counter()).update(set(cells))
        self._sources.setdefault(split, Counter())[record.source] += 1
        if len(shard.pending) >= self.group_rows or shard.pending_bytes >= self.group_bytes:
            shard.flush()
            if shard.bytes >= self.shard_bytes:
                self._shards[split].append(shard.close())
                del self._open[split]

    def close(self) -> "Dataset":
        """Finish every shard, write the manifest, and open the result."""
        for split, shard in self._open.items():
            self._shards[split].append(shard.close())
        self._open = {}
        order = sorted(self._shards, key=lambda split: (split != "train", split))
        manifest = Manifest(
            schema_version=SCHEMA_VERSION, name=self.name, splits={split: self._finish(split) for split in order}
        )
        write_atomically(self.folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
        return open_dataset(self.folder)

    def _finish(self, split: str) -> SplitInfo:
        """Write a split's table of shards."""
        content = write_index(self._shards[split])
        index = ShardIndex.read(content)
        write_atomically(self.folder / index_file(split), content)
        pairs, captions = self._pairs[split], self._captions[split]
        languages: Counter[str] = Counter()
        for (_, language), count in captions.items():
            languages[language] += count
        return SplitInfo(
            rows=index.rows,
            languages=dict(sorted(languages.items())),
            sources=dict(sorted(self._sources[split].items())),
            counts=[
                Count(source=source, language=language, pairs=pairs[source, language], captions=count)
                for (source, language), count in sorted(captions.items())
            ],
            index=index_info(index_file(split), index, content),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            for shard in self._open.values():
                shard.abandon()


def index_file(split: str) -> str:
    """The name of a split's table of shards."""
    return f"manifest.{split}.parquet"
