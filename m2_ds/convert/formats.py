"""Weights into open files: safetensors, and torch.save's zip archive. Tensors go through in chunks, never whole."""

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from m2_ds.convert import safetensors_file
from m2_ds.convert.fit import Entry

_ALIGNMENT = 64  # of storages in a zip archive, as torch has it
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}


class Sink(Protocol):
    """A file that is written from its beginning to its end. ``written``: bytes so far."""

    written: int

    def write(self, data: memoryview | bytes, /) -> int: ...

    def flush(self) -> None: ...


Writer = Callable[[Sink], None]


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Wider types first: then every tensor of a safetensors file is aligned for its type."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def safetensors_header(entries: Sequence[Entry]) -> bytes:
    return safetensors_file.header({entry.name: (entry.dtype, entry.shape) for entry in entries})


def write_safetensors(sink: Sink, entries: Sequence[Entry]) -> None:
    """``entries`` as `in_file_order` has them."""
    sink.write(safetensors_header(entries))
    for chunk in ahead(chunk for entry in entries for chunk in entry.chunks()):
        sink.write(as_bytes(chunk))


def ahead(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same ones; the next is read by a thread while this one is written."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = thread.submit(next, chunks, None)
            yield chunk


def as_bytes(chunk: Tensor) -> memoryview:
    """The numbers of a flat tensor, little-endian."""
    raw = chunk.view(torch.uint8)
    if sys.byteorder == "big":
        raw = raw.view(-1, chunk.dtype.itemsize).flip(1).reshape(-1)
    return memoryview(cast(Any, raw.numpy()))


# -- torch.save -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    key: str
    entry: Entry


class _Pickler(pickle.Pickler):
    """Writes an `Entry` as torch.save writes a tensor whose storage lies elsewhere in the archive."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[_Storage] = []

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, Entry):
            return NotImplemented
        storage = _Storage(str(len(self.storages)), value)
        self.storages.append(storage)
        strides = torch.empty(value.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, value.shape, strides, False, OrderedDict())

    def persistent_id(self, value: object) -> Any:
        if not isinstance(value, _Storage):
            return None
        count = value.entry.nbytes // value.entry.dtype.itemsize
        return "storage", _STORAGES[value.entry.dtype], value.key, "cpu", count


def write_torch_zip(sink: Sink, content: Any, root: str) -> None:
    """A file of torch.save holding ``content``, in which an `Entry` stands for a tensor.

    The archive says sizes and checksums behind each record instead of before it, so that nothing is written twice.
    """
    objects = io.BytesIO()
    pickler = _Pickler(objects)
    pickler.dump(content)
    with zipfile.ZipFile(cast(Any, sink), "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{root}/data.pkl"), objects.getvalue())
        archive.writestr(zipfile.ZipInfo(f"{root}/byteorder"), b"little")
        for storage in pickler.storages:
            record = zipfile.ZipInfo(f"{root}/data/{storage.key}")
            record.file_size = storage.entry.nbytes
            record.extra = _filling(sink.written, record)
            with archive.open(record, "w") as file:
                for chunk in ahead(storage.entry.chunks()):
                    file.write(as_bytes(chunk))
        archive.writestr(zipfile.ZipInfo(f"{root}/version"), b"3\n")


def _filling(position: int, record: zipfile.ZipInfo) -> bytes:
    """An extra field that pushes the record's bytes to the next multiple of the alignment."""
    large = record.file_size * 1.05 > zipfile.ZIP64_LIMIT  # then zipfile adds a field of its own
    begins = position + 30 + len(record.filename) + (20 if large else 0) + 4
    filling = -begins % _ALIGNMENT
    return struct.pack("<2sH", b"FB", filling) + bytes(filling)
