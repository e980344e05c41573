"""Row groups of a split's shards, from files of this machine or by requests for ranges of bytes.

Of a remote shard the footer is one request, and each row group another; both can stay in a cache on disk. Only so many
files and footers are open at a time, however many shards there are.
"""

import io
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from m2_ds.data.cache import DiskCache
from m2_ds.data.index import ShardIndex
from m2_ds.data.records import SCHEMA
from m2_ds.data.store import LocalStore, RemoteStore, StoreError

OPEN_SHARDS = 64
_MAGIC, _TAIL = b"PAR1", 8  # a Parquet file ends with its footer, the footer's length (uint32) and these letters


class RowGroups:
    """Reads row groups by their number in the split. Threads may share it; its copies open files anew."""

    def __init__(self, store: LocalStore | RemoteStore, index: ShardIndex, disk: DiskCache | None = None) -> None:
        self.store, self.index = store, index
        self.disk = disk if isinstance(store, RemoteStore) else None
        self._forget()

    def _forget(self) -> None:
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()  # local
        self._footers: OrderedDict[int, pq.FileMetaData] = OrderedDict()  # remote
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "index": self.index, "disk": self.disk}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def is_remote(self) -> bool:
        return isinstance(self.store, RemoteStore)

    def where(self, group: int) -> str:
        """The shard that holds a row group, for messages."""
        return self.store.where(self.index.file(self.index.place(group)[0]))

    def table(self, group: int, columns: Sequence[str] | None = None, content: bytes | None = None) -> pa.Table:
        """A row group, or some of its columns. ``content``: what `fetch` gave for it.

        Raises:
            ValueError: it cannot be read; names file and row group.
        """
        shard, inside = self.index.place(group)
        try:
            if isinstance(self.store, LocalStore):
                with self._lock:  # a file has one position
                    file = self._local(shard, self.store)
                    return file.read_row_group(inside, columns=columns, use_threads=False)
            if content is None and columns is None:
                content = self.fetch(group)
            footer = self._footer(shard)
            source = _Ranges(self.store, self.index.file(shard), self.index.size(shard))
            if content is not None:
                source.have(_extent(footer, inside)[0], content)
            file = pq.ParquetFile(source, metadata=footer, page_checksum_verification=True)
            return file.read_row_group(inside, columns=columns, use_threads=False)
        except StoreError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(
                f"{self.where(group)}, row group {inside}: can't be read ({error}); fetch or build this data set again"
            ) from error

    def fetch(self, group: int, *, wait: bool = True) -> bytes | None:
        """The encoded bytes of a remote row group, from the cache on disk if it is there.

        ``wait``: see `DiskCache.get_or_fetch`.
        """
        shard, inside = self.index.place(group)
        start, stop = _extent(self._footer(shard), inside)
        return self._kept(shard, f"{inside:05d}", start, stop, wait=wait)

    def _kept(self, shard: int, what: str, start: int, stop: int, *, wait: bool = True) -> bytes | None:
        file = self.index.file(shard)

        def get() -> bytes:
            return self.store.read_range(file, start, stop)

        if self.disk is None:
            return get()
        return self.disk.get_or_fetch(f"{self.index.sha256(shard)}-{what}", get, wait=wait)

    def _local(self, shard: int, store: LocalStore) -> pq.ParquetFile:
        file = self._files.get(shard)
        if file is None:
            name = self.index.file(shard)
            path = store.path(name)
            try:
                size = store.size(name)
            except FileNotFoundError:
                raise StoreError(
                    f"{path} is missing although the manifest lists it; fetch or build the data set again"
                ) from None
            if size != self.index.size(shard):
                raise StoreError(cut_short(str(path), size, self.index.size(shard)))
            # Not mapped into memory: reading from a file that is cut short meanwhile would kill the process.
            file = pq.ParquetFile(path, memory_map=False, page_checksum_verification=True)
            self._check(shard, file.metadata)
            self._files[shard] = file
            if len(self._files) > OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(shard)
        return file

    def _footer(self, shard: int) -> pq.FileMetaData:
        with self._lock:
            if shard in self._footers:
                self._footers.move_to_end(shard)
                return self._footers[shard]
        size = self.index.size(shard)
        length = self.index.footer(shard) or self._footer_length(shard)
        content = self._kept(shard, "footer", size - length, size)
        assert content is not None
        where = self.store.where(self.index.file(shard))
        try:
            if content[-4:] != _MAGIC:
                raise ValueError("no Parquet footer where the manifest has it")
            footer = pq.read_metadata(_Ranges.of_tail(content, size))
            self._check(shard, footer)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise StoreError(
                f"{where} is not the file of the manifest ({error}); upload or build this data set again"
            ) from error
        with self._lock:
            self._footers[shard] = footer
            if len(self._footers) > OPEN_SHARDS:
                self._footers.popitem(last=False)
        return footer

    def _footer_length(self, shard: int) -> int:
        """Where the manifest does not tell it (schema version 1)."""
        size = self.index.size(shard)
        end = self.store.read_range(self.index.file(shard), size - _TAIL, size)
        return min(size, struct.unpack("<I", end[:4])[0] + _TAIL)

    def _check(self, shard: int, footer: pq.FileMetaData) -> None:
        """ValueError where rows or columns are not those of the manifest and the schema."""
        rows = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        if rows != self.index[shard].row_groups:
            raise ValueError(f"{sum(rows)} rows in {len(rows)} row groups are not those of the manifest")
        found = footer.schema.to_arrow_schema()
        if found.names != SCHEMA.names:
            raise ValueError(f"columns {found.names} are not those of a data set, {SCHEMA.names}")
        for field in SCHEMA:
            if not found.field(field.name).type.equals(field.type):
                raise ValueError(f"column {field.name!r} is {found.field(field.name).type}, not {field.type}")


def cut_short(where: str, size: int, wanted: int) -> str:
    return (
        f"{where} has {size} bytes, the manifest says {wanted}: cut short or replaced; "
        "fetch or build this data set again"
    )


def footer_length(path: Any) -> int:
    """Bytes of a Parquet file's footer with its length and magic."""
    with open(path, "rb") as handle:
        handle.seek(-_TAIL, io.SEEK_END)
        return int(struct.unpack("<I", handle.read(4))[0]) + _TAIL


def _extent(footer: pq.FileMetaData, inside: int) -> tuple[int, int]:
    """Where a row group's column chunks lie: [start, stop) in the file."""
    group = footer.row_group(inside)
    start, stop = None, 0
    for number in range(group.num_columns):
        chunk = group.column(number)
        first = chunk.data_page_offset
        if chunk.dictionary_page_offset is not None:
            first = min(first, chunk.dictionary_page_offset)
        start = first if start is None else min(start, first)
        stop = max(stop, first + chunk.total_compressed_size)
    assert start is not None
    return start, stop


class _Ranges(io.RawIOBase):
    """A remote file as pyarrow reads one: from the piece that is here, else by a request for the range."""

    def __init__(self, store: RemoteStore | None, name: str, size: int) -> None:
        super().__init__()
        self._store, self._name, self._size = store, name, size
        self._position, self._start, self._piece = 0, 0, b""

    @classmethod
    def of_tail(cls, content: bytes, size: int) -> "_Ranges":
        """A file of which the end is known, for reading the footer from it."""
        file = cls(None, "", size)
        file.have(size - len(content), content)
        return file

    def have(self, start: int, piece: bytes) -> None:
        self._start, self._piece = start, piece

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        start = self._position
        self._position = stop = self._size if count < 0 else min(self._size, start + count)
        inside = start - self._start
        if inside >= 0 and stop - self._start <= len(self._piece):
            return self._piece[inside : stop - self._start]
        if self._store is not None:
            return self._store.read_range(self._name, start, stop)
        # pyarrow asks for more of a file's end than its footer, and looks at the footer only.
        return bytes(-inside) + self._piece
