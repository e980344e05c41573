"""Which shards a split has and which rows lie in which row group, for hundreds of millions of rows.

On disk a table `manifest.SPLIT.parquet` beside manifest.json, one row a shard; in memory flat arrays, 4 bytes a row
group and 70 a shard.

Shapes: S shards, G row groups, N row or row-group numbers asked for at once.
"""

import io
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from m2_ds.data.records import ShardInfo

_COLUMNS = pa.schema(
    [
        ("file", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),
        ("footer", pa.int32()),
        ("row_groups", pa.list_(pa.int32())),
    ]
)


class ShardIndex(Sequence[ShardInfo]):
    """The shards of a split, in order. Row groups and rows are numbered through all of them.

    Args:
        table: one row a shard with the columns above.

    Raises:
        ValueError: another table, or one whose numbers contradict each other.
    """

    def __init__(self, table: pa.Table) -> None:
        if not table.schema.equals(_COLUMNS):
            raise ValueError(f"its columns are {table.schema.to_string(show_field_metadata=False)!r}")
        table = table.combine_chunks()
        self._files = _only(table.column("file"), pa.string())
        self._bytes = table.column("bytes").to_numpy()
        self._footers = table.column("footer").to_numpy()
        hashes = _only(table.column("sha256"), pa.binary(32))
        self._sha256 = np.frombuffer(hashes.buffers()[1] or b"", dtype=np.uint8)[hashes.offset * 32 :][
            : len(hashes) * 32
        ]
        groups = _only(table.column("row_groups"), pa.list_(pa.int32()))
        sizes = groups.flatten().to_numpy().astype(np.int64)
        self._first_group = np.concatenate([[0], np.cumsum(groups.value_lengths().to_numpy())]).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        self._first_row = starts[self._first_group]
        rows = table.column("rows").to_numpy()
        if sizes.min(initial=1) < 1 or rows.min(initial=1) < 1 or (np.diff(self._first_row) != rows).any():
            raise ValueError("rows and row groups of its shards do not add up")
        # Within the shard: half the memory of numbers that count through all shards.
        within = starts[:-1] - np.repeat(self._first_row[:-1], np.diff(self._first_group))
        self._group_start = within.astype(np.uint32)

    @classmethod
    def of(cls, shards: Sequence[ShardInfo]) -> "ShardIndex":
        return cls(_table(shards))

    @classmethod
    def read(cls, content: bytes) -> "ShardIndex":
        """From the bytes of an index file. Raises ValueError (pyarrow's included) for others."""
        return cls(pq.read_table(pa.BufferReader(content), use_threads=False))

    @property
    def rows(self) -> int:
        return int(self._first_row[-1])

    @property
    def row_groups(self) -> int:
        return len(self._group_start)

    @property
    def total_bytes(self) -> int:
        """Of all shards together."""
        return int(self._bytes.sum())

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, shard: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, shard: slice) -> list[ShardInfo]: ...
    def __getitem__(self, shard: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(shard, slice):
            return [self[number] for number in range(*shard.indices(len(self)))]
        shard = range(len(self))[shard]
        first, last = self._first_group[shard : shard + 2].tolist()
        return ShardInfo(
            file=self.file(shard),
            rows=int(self._first_row[shard + 1] - self._first_row[shard]),
            row_groups=self.sizes(np.arange(first, last)).tolist(),
            bytes=int(self._bytes[shard]),
            sha256=self.sha256(shard),
            footer=int(self._footers[shard]),
        )

    def __iter__(self) -> Iterator[ShardInfo]:
        return (self[shard] for shard in range(len(self)))

    def file(self, shard: int) -> str:
        return str(self._files[shard].as_py())

    def files(self) -> list[str]:
        return self._files.to_pylist()  # type: ignore[no-any-return]

    def sha256(self, shard: int) -> str:
        return self._sha256[32 * shard : 32 * shard + 32].tobytes().hex()

    def size(self, shard: int) -> int:
        """Bytes of the file."""
        return int(self._bytes[shard])

    def footer(self, shard: int) -> int:
        """Bytes of the file's footer; 0: not known."""
        return int(self._footers[shard])

    def place(self, group: int) -> tuple[int, int]:
        """(shard, number of the row group within it)."""
        shard = int(np.searchsorted(self._first_group, group, side="right")) - 1
        return shard, group - int(self._first_group[shard])

    def groups_of(self, rows: np.ndarray) -> np.ndarray:
        """The row groups of rows: int64 [N] -> int64 [N]."""
        shards = np.searchsorted(self._first_row, rows, side="right") - 1
        within = rows - self._first_row[shards]
        groups = np.empty_like(within)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            first, last = self._first_group[shard : shard + 2].tolist()
            groups[mine] = first + np.searchsorted(self._group_start[first:last], within[mine], side="right") - 1
        return groups

    def starts(self, groups: np.ndarray) -> np.ndarray:
        """First rows of row groups: int64 [N] -> int64 [N]; `row_groups` itself gives `rows`."""
        shards = np.searchsorted(self._first_group, groups, side="right") - 1
        inside = groups < self.row_groups
        found = self._first_row[np.minimum(shards, len(self._first_row) - 1)].copy()
        found[inside] += self._group_start[groups[inside]]
        return found

    def sizes(self, groups: np.ndarray | None = None) -> np.ndarray:
        """Rows of row groups: int64 [N] -> int64 [N]; None: of all."""
        if groups is None:
            starts = self._group_start.astype(np.int64)
            sizes = np.diff(starts, append=0)
            last = self._first_group[1:] - 1
            sizes[last] = np.diff(self._first_row) - starts[last]
            return sizes
        return self.starts(groups + 1) - self.starts(groups)


def write_index(shards: Sequence[ShardInfo]) -> bytes:
    """The index file of a split's shards."""
    out = io.BytesIO()
    pq.write_table(_table(shards), out, compression="zstd", write_page_checksum=True)
    return out.getvalue()


def _table(shards: Sequence[ShardInfo]) -> pa.Table:
    columns = {
        "file": [shard.file for shard in shards],
        "rows": [shard.rows for shard in shards],
        "bytes": [shard.bytes for shard in shards],
        "sha256": [bytes.fromhex(shard.sha256) for shard in shards],
        "footer": [shard.footer for shard in shards],
        "row_groups": [shard.row_groups for shard in shards],
    }
    return pa.table(columns, schema=_COLUMNS)


def _only(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], kind)
