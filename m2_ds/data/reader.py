"""Reading a data set: rows at random through a bounded cache of row groups, or one after another.

What is cached in memory are decoded row groups, the least recently used leaving first. Of an object store, row groups
that will be needed are fetched ahead of time by threads.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from m2_ds.data.cache import DiskCache
from m2_ds.data.index import ShardIndex
from m2_ds.data.records import (
    SCHEMA,
    SCHEMA_VERSION,
    Caption,
    HardNegative,
    IndexInfo,
    Manifest,
    Manifest1,
    Record,
    ShardInfo,
    SplitInfo,
)
from m2_ds.data.row_groups import RowGroups, cut_short
from m2_ds.data.store import LocalStore, RemoteStore, StoreError, open_store
from m2_ds.files import sha256

MANIFEST = "manifest.json"
DEFAULT_CACHE_BYTES = 256 << 20
# Shards whose presence and size are looked at when a split is opened; of more, each when it is first read.
CHECKED_AT_OPENING = 2048
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
            image=self.images[row].as_py() or b"",
            captions=[Caption(**caption) for caption in self.captions[row] or ()],
            hard_negatives=[HardNegative(**negative) for negative in self.negatives[row] or ()],
            **{name: column[row] for name, column in self.plain.items()},
        )


class Split:
    """One split of a data set. Threads may share it; copies sent to other processes start with empty caches.

    ``index``: its shards and row groups. ``info``: what the manifest tells of it.
    """

    def __init__(
        self,
        row_groups: RowGroups,
        name: str,
        info: SplitInfo,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        read_ahead: int = 0,
    ) -> None:
        self.row_groups, self.name, self.info = row_groups, name, info
        self.index, self.folder = row_groups.index, row_groups.store.place
        self.cache_bytes, self.read_ahead = cache_bytes, read_ahead if row_groups.is_remote else 0
        self._forget()

    def _forget(self) -> None:
        self._groups: OrderedDict[int, _Group] = OrderedDict()
        self._held = 0
        self._coming: dict[int, Future[bytes | None]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_groups", "_held", "_coming", "_pool", "_lock")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return self.info.rows

    @property
    def languages(self) -> dict[str, int]:
        """Captions by language."""
        return self.info.languages

    @property
    def group_sizes(self) -> np.ndarray:
        """Rows of every row group, int64 [row groups]."""
        return self.index.sizes()

    def _group(self, group: int) -> _Group:
        with self._lock:
            found = self._groups.get(group)
            if found is None:
                found = self._groups[group] = self._load(group)
                self._held += found.bytes
                while self._held > self.cache_bytes and len(self._groups) > 1:
                    self._held -= self._groups.popitem(last=False)[1].bytes
            else:
                self._groups.move_to_end(group)
            return found

    def _load(self, group: int) -> _Group:
        content = None
        if (coming := self._coming.pop(group, None)) is not None and not coming.cancel():
            try:
                content = coming.result()
            except (StoreError, CancelledError):
                content = None  # asked for once more below, which tells the error
        table = self.row_groups.table(group, content=content)
        try:
            return _Group(table)
        except ValueError as error:  # text that is no UTF-8
            raise ValueError(f"{self.row_groups.where(group)}: {error}; build this data set again") from error

    def ahead(self, groups: Iterable[int]) -> None:
        """Begin to fetch row groups of an object store that will be needed soon, in this order.

        They go to the cache on disk. Without one they stay in memory until they are read, as many of them as half of
        `cache_bytes` holds.
        """
        if not self.read_ahead:
            return
        wanted = [group for group in groups if group not in self._groups]
        with self._lock:
            # What was not read after all, because a run went on elsewhere, makes room; as does what is on disk by now.
            self._coming = {
                group: future
                for group, future in self._coming.items()
                if group in wanted and not (future.done() and (future.cancelled() or future.exception()))
            }
            if self.row_groups.disk is None:
                mean = self.index.total_bytes / max(1, self.index.row_groups)
                wanted = wanted[: max(1, int(self.cache_bytes / 2 / max(mean, 1)))]
            else:  # processes of a machine share the work: each begins elsewhere
                first = os.getpid() % max(1, len(wanted))
                wanted = wanted[first:] + wanted[:first]
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.read_ahead, thread_name_prefix="m2-read-ahead")
            for group in wanted:
                if group not in self._coming:
                    self._coming[group] = self._pool.submit(self._fetch, group)

    def _fetch(self, group: int) -> bytes | None:
        content = self.row_groups.fetch(group, wait=False)
        return content if self.row_groups.disk is None else None

    def close(self) -> None:
        """End reading ahead."""
        if self._pool is not None:
            assert isinstance(self.row_groups.store, RemoteStore)
            with self.row_groups.store.without_retries():
                self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool, self._coming = None, {}

    def read(self, rows: Sequence[int]) -> list[Record]:
        """Records at the given row numbers, in the order asked for.

        Raises:
            IndexError: a row outside the split.
            ValueError: a shard that can't be read; names the file.
        """
        if len(rows) and not 0 <= min(rows) <= max(rows) < len(self):
            raise IndexError(f"rows {min(rows)}..{max(rows)} asked of split {self.name!r}, which has {len(self)}")
        wanted = np.asarray(rows, dtype=np.int64)
        groups = self.index.groups_of(wanted)
        inside = wanted - self.index.starts(groups)
        return [self._group(group).record(row) for group, row in zip(groups.tolist(), inside.tolist())]

    def iter(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """All rows in order as plain dictionaries, only the named columns (all by default). Nothing is cached."""
        unknown = set(columns or ()) - set(SCHEMA.names)
        if unknown:
            raise ValueError(f"no such columns: {sorted(unknown)}; there are {SCHEMA.names}")
        for group in range(self.index.row_groups):
            yield from self.row_groups.table(group, columns).to_pylist()

    def file_of(self, row: int) -> str:
        """The shard that holds a row, for messages."""
        return self.row_groups.where(int(self.index.groups_of(np.asarray([row]))[0]))


class Dataset:
    """A folder of shards with its manifest. Made by `open_dataset`.

    ``digest``: SHA-256 of the manifest, which holds those of the tables of shards, which hold those of the shards.
    """

    def __init__(
        self,
        store: LocalStore | RemoteStore,
        manifest: Manifest,
        digest: str = "",
        shards: dict[str, ShardIndex] | None = None,
    ) -> None:
        self.store, self.manifest, self.digest = store, manifest, digest
        self._indices = shards or {}

    @property
    def folder(self) -> Path | str:
        """A path or a URL."""
        return self.store.place

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def splits(self) -> list[str]:
        return list(self.manifest.splits)

    def index(self, name: str) -> ShardIndex:
        """The shards of a split.

        Raises:
            ValueError: no such split, or its table is missing or damaged.
        """
        if name not in self.manifest.splits:
            raise ValueError(f"{self.folder} has no split {name!r}; it has {', '.join(self.splits)}")
        if name not in self._indices:
            info = self.manifest.splits[name]
            where = self.store.where(info.index.file)
            try:
                content = self.store.read(info.index.file)
                if (found := hashlib.sha256(content).hexdigest()) != info.index.sha256:
                    raise ValueError(f"checksum {found[:12]}... is not the manifest's {info.index.sha256[:12]}...")
                index = ShardIndex.read(content)
                if index.rows != info.rows:
                    raise ValueError(f"{index.rows} rows, the manifest says {info.rows}")
            except StoreError:
                raise
            except (OSError, ValueError, pa.ArrowException) as error:
                raise ValueError(f"{where}: {error}; fetch or build this data set again") from error
            self._indices[name] = index
        return self._indices[name]

    def split(
        self,
        name: str,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        disk: DiskCache | None = None,
        read_ahead: int = 0,
    ) -> Split:
        """One split, its row-group cache in memory bounded by `cache_bytes`.

        Args:
            disk: where encoded row groups of an object store are kept.
            read_ahead: threads that fetch row groups of an object store ahead of need.

        Raises:
            ValueError: no such split, or a shard that is missing or cut short. Shards of an object store, and of
                splits of more than 2,048, are looked at when they are first read.
        """
        index = self.index(name)
        if isinstance(self.store, LocalStore) and len(index) <= CHECKED_AT_OPENING:
            self._look_at_files(self.store, index)
        return Split(RowGroups(self.store, index, disk), name, self.manifest.splits[name], cache_bytes, read_ahead)

    def _look_at_files(self, store: LocalStore, index: ShardIndex) -> None:
        for shard, file in enumerate(index.files()):
            path = store.path(file)
            try:
                size = store.size(file)
            except OSError as error:
                raise ValueError(
                    f"{path} is missing although the manifest lists it; fetch or build the data set again"
                ) from error
            if size != index.size(shard):
                raise ValueError(cut_short(str(path), size, index.size(shard)))

    def verify(self) -> int:
        """Read every shard and compare its checksum; the number of shards read.

        Raises:
            ValueError: the first shard that is missing, cut short or changed, by name.
        """
        shards = [shard for name in self.splits for shard in self.index(name)]
        for shard in shards:
            self.verify_shard(shard)
        return len(shards)

    def verify_shard(self, shard: ShardInfo) -> None:
        """Read one shard and compare its checksum; ValueError names the file."""
        where = self.store.where(shard.file)
        try:
            if isinstance(self.store, LocalStore):
                found = sha256(self.store.path(shard.file))
            else:
                found = self._remote_sha256(shard)
        except FileNotFoundError:
            raise ValueError(f"{where} is missing although the manifest lists it; fetch or build it again") from None
        if found != shard.sha256:
            raise ValueError(
                f"{where}: checksum {found[:12]}... is not the manifest's {shard.sha256[:12]}...; "
                "the file was changed; fetch or build this data set again"
            )

    def _remote_sha256(self, shard: ShardInfo, step: int = 32 << 20) -> str:
        digest = hashlib.sha256()
        for start in range(0, shard.bytes, step):
            digest.update(self.store.read_range(shard.file, start, min(shard.bytes, start + step)))
        return digest.hexdigest()


def open_dataset(folder: Path | str) -> Dataset:
    """Open a data set's folder, or its URL in an object store; reads the manifest only.

    Raises:
        ValueError: no manifest there, one that can't be read, or one of another schema version; a URL whose driver is
            not installed.
    """
    store = open_store(folder)
    where = store.where(MANIFEST)
    try:
        raw = store.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{store.place} holds no data set (no {MANIFEST}); build one with `m2 data --help`") from None
    try:
        content = json.loads(raw)
        version = content.get("schema_version") if isinstance(content, dict) else None
        digest = hashlib.sha256(raw).hexdigest()
        if version == 1:
            return _version_1(store, content, digest)
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version is {version!r}, this program reads 1 and {SCHEMA_VERSION}; build it again"
            )
        return Dataset(store, Manifest.model_validate(content), digest)
    except (ValueError, ValidationError) as error:
        raise ValueError(f"{where}: {error}") from error


def _version_1(store: LocalStore | RemoteStore, content: dict[str, Any], digest: str) -> Dataset:
    """A data set whose manifest holds the shards themselves, and no counts by source and language together."""
    old = Manifest1.model_validate(content)
    indices = {name: ShardIndex.of(info.shards) for name, info in old.splits.items()}
    splits = {
        name: SplitInfo(
            rows=info.rows,
            languages=info.languages,
            sources=info.sources,
            counts=[],
            index=index_info(MANIFEST, indices[name], b""),
        )
        for name, info in old.splits.items()
    }
    return Dataset(store, Manifest(schema_version=1, name=old.name, splits=splits), digest, indices)


def index_info(file: str, index: ShardIndex, content: bytes) -> IndexInfo:
    """What the manifest tells of an index file."""
    return IndexInfo(
        file=file,
        shards=len(index),
        row_groups=index.row_groups,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
