"""Reading a data set: rows at random through a bounded cache of row groups, or one after another.

Files are memory-mapped; what is cached are decoded row groups, the least recently used leaving first.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from m2_ds.data.records import SCHEMA, SCHEMA_VERSION, Caption, HardNegative, Manifest, Record, ShardInfo, SplitInfo
from m2_ds.files import sha256

DEFAULT_CACHE_BYTES = 256 << 20
_PLAIN = [name for name in SCHEMA.names if name not in ("image", "captions", "hard_negatives")]


class _Group:
    """One decoded row group: pictures stay in Arrow's buffer, the small columns become Python objects once."""

    def __init__(self, table: pa.Table) -> None:
        self.images = table.column("image").combine_chunks()
        if isinstance(self.images, pa.ChunkedArray):
            self.images = self.images.chunk(0)
        self.plain = {name: table.column(name).to_pylist() for name in _PLAIN}
        self.captions = table.column("captions").to_pylist()
        self.negatives = table.column("hard_negatives").to_pylist()
        # Python objects of the text columns take several times the space of their Arrow form.
        self.bytes = self.images.nbytes + 6 * (table.nbytes - self.images.nbytes)

    def record(self, row: int) -> Record:
        return Record(
            image=self.images[row].as_py(),
            captions=[Caption(**caption) for caption in self.captions[row]],
            hard_negatives=[HardNegative(**negative) for negative in self.negatives[row] or ()],
            **{name: column[row] for name, column in self.plain.items()},
        )


class Split:
    """One split of a data set. Threads may share it; copies sent to other processes start with empty caches."""

    def __init__(self, folder: Path, name: str, info: SplitInfo, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.folder, self.name, self.info, self.cache_bytes = folder, name, info, cache_bytes
        self.group_sizes: list[int] = [rows for shard in info.shards for rows in shard.row_groups]
        self._places = [(s, g) for s, shard in enumerate(info.shards) for g in range(len(shard.row_groups))]
        self.group_starts = np.concatenate([[0], np.cumsum(self.group_sizes)]).astype(np.int64)
        self._forget()

    def _forget(self) -> None:
        self._files: dict[int, pq.ParquetFile] = {}
        self._groups: OrderedDict[int, _Group] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_files", "_groups", "_held", "_lock")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return self.info.rows

    @property
    def languages(self) -> dict[str, int]:
        """Captions by language."""
        return self.info.languages

    def _path(self, shard: int) -> Path:
        return self.folder / self.info.shards[shard].file

    def _table(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        shard, inside = self._places[group]
        path = self._path(shard)
        try:
            if shard not in self._files:
                file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
                rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                if rows != self.info.shards[shard].row_groups or file.schema_arrow.names != SCHEMA.names:
                    raise ValueError("rows or columns are not those of the manifest")
                self._files[shard] = file
            return self._files[shard].read_row_group(inside, columns=columns, use_threads=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(
                f"{path}, row group {inside}: can't be read ({error}); fetch or build this data set again"
            ) from error

    def _group(self, group: int) -> _Group:
        with self._lock:
            found = self._groups.get(group)
            if found is None:
                found = self._groups[group] = _Group(self._table(group))
                self._held += found.bytes
                while self._held > self.cache_bytes and len(self._groups) > 1:
                    self._held -= self._groups.popitem(last=False)[1].bytes
            else:
                self._groups.move_to_end(group)
            return found

    def read(self, rows: Sequence[int]) -> list[Record]:
        """Records at the given row numbers, in the order asked for.

        Raises:
            IndexError: a row outside the split.
            ValueError: a shard that can't be read; names the file.
        """
        if rows and not 0 <= min(rows) <= max(rows) < len(self):
            raise IndexError(f"rows {min(rows)}..{max(rows)} asked of split {self.name!r}, which has {len(self)}")
        groups = np.searchsorted(self.group_starts, np.asarray(rows, dtype=np.int64), side="right") - 1
        return [self._group(int(group)).record(int(row - self.group_starts[group])) for row, group in zip(rows, groups)]

    def iter(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """All rows in order as plain dictionaries, only the named columns (all by default). Nothing is cached."""
        unknown = set(columns or ()) - set(SCHEMA.names)
        if unknown:
            raise ValueError(f"no such columns: {sorted(unknown)}; there are {SCHEMA.names}")
        for group in range(len(self.group_sizes)):
            yield from self._table(group, columns).to_pylist()

    def file_of(self, row: int) -> Path:
        """The shard that holds a row, for messages."""
        return self._path(self._places[int(np.searchsorted(self.group_starts, row, side="right")) - 1][0])


class Dataset:
    """A folder of shards with its manifest. Made by `open_dataset`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def splits(self) -> list[str]:
        return list(self.manifest.splits)

    def split(self, name: str, cache_bytes: int = DEFAULT_CACHE_BYTES) -> Split:
        """One split, its row-group cache bounded by `cache_bytes`.

        Raises:
            ValueError: no such split, or a shard that is missing or cut short.
        """
        if name not in self.manifest.splits:
            raise ValueError(f"{self.folder} has no split {name!r}; it has {', '.join(self.splits)}")
        info = self.manifest.splits[name]
        for shard in info.shards:
            path = self.folder / shard.file
            if not path.is_file():
                raise ValueError(f"{path} is missing although the manifest lists it; fetch or build the data set again")
            if path.stat().st_size != shard.bytes:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, the manifest says {shard.bytes}: cut short or replaced; "
                    "fetch or build this data set again"
                )
        return Split(self.folder, name, info, cache_bytes)

    def verify(self) -> int:
        """Read every shard and compare its checksum; the number of shards read.

        Raises:
            ValueError: the first shard that is missing, cut short or changed, by name.
        """
        shards = [shard for name in self.splits for shard in self.split(name).info.shards]
        for shard in shards:
            self.verify_shard(shard)
        return len(shards)

    def verify_shard(self, shard: ShardInfo) -> None:
        """Read one shard and compare its checksum; ValueError names the file."""
        found = sha256(self.folder / shard.file)
        if found != shard.sha256:
            raise ValueError(
                f"{self.folder / shard.file}: checksum {found[:12]}... is not the manifest's {shard.sha256[:12]}...; "
                "the file was changed; fetch or build this data set again"
            )


def open_dataset(folder: Path | str) -> Dataset:
    """Open a data set's folder; reads the manifest only.

    Raises:
        ValueError: no manifest there, one that can't be read, or one of another schema version.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no data set (no manifest.json); build one with `m2 data --help`")
    try:
        content = json.loads(path.read_text())
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {version!r}, this program reads {SCHEMA_VERSION}; build it again")
        return Dataset(folder, Manifest.model_validate(content))
    except (ValueError, ValidationError) as error:
        raise ValueError(f"{path}: {error}") from error
