"""Files of torch.save, read without torch.load: what they hold, with tensors as places in the file.

Two containers. Since torch 1.6 a zip archive, nothing in it compressed:
  NAME/data.pkl       the objects; tensors refer to storages by key
  NAME/data/KEY       the bytes of a storage
  NAME/byteorder      little or big; absent in old files, which are little
Before that ("legacy") five pickles in a row (a magic number, the protocol's version, facts on the machine, the objects,
the keys of the storages) and then each storage: its length as int64, its bytes.
"""

import io
import math
import struct
import sys
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m2_ds.convert.inert import MAX_PICKLE_BYTES, Builder, Capped, Global, Inert, InertUnpickler, is_pickle
from m2_ds.convert.stored import Stored, Stretch, in_file

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a file in a zip archive: signature, lengths of name and extra field
_ZIP, _LOCAL_SIGNATURE = b"PK", b"PK\3\4"

_TYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    + ("complex64", "complex128")
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
# Names that torch's own safe loading takes and that hold no weights: let through, and not looked at.
_HARMLESS = (
    ("torch", ("device", "Tensor", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype)))),
    ("torch._utils", ("_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage", "_rebuild_qtensor")),
    ("torch._utils", ("_rebuild_wrapper_subclass", "_rebuild_device_tensor_from_cpu_tensor")),
    ("torch.serialization", ("_get_layout",)),
    ("collections", ("Counter",)),
    ("builtins", ("set", "complex", "bytearray")),
    ("__builtin__", ("set", "complex", "bytearray")),
    ("_codecs", ("encode",)),
)


@dataclass(frozen=True)
class TorchFile:
    """``content``: dictionaries, lists, plain values, `Stored` tensors; `Inert` objects of the classes ``inert``."""

    content: Any
    container: str
    inert: tuple[str, ...]


@dataclass(frozen=True)
class _Storage:
    """Bytes ``offset`` to ``offset + size`` of the file, of numbers of ``dtype`` where the storage has a type."""

    offset: int
    size: int
    dtype: torch.dtype


def read_torch_file(path: Path, allow: Collection[str] = ()) -> TorchFile:
    """Raises ValueError that names the file: no torch file, damaged, or objects that are not in ``allow``.

    ``allow``: classes ("module.Class"; "package.*" for all below) whose objects may be in the file. Nothing is made of
    them, and their code is not imported.
    """
    reader = _Reader(path, allow)
    try:
        with open(path, "rb") as file:
            reader.size = path.stat().st_size
            head = file.read(4)
            file.seek(0)
            if head[:2] == _ZIP:
                return TorchFile(_refuse_foreign(reader, lambda: reader.zip(file)), "zip", reader.inert())
            if is_pickle(head):
                return TorchFile(_refuse_foreign(reader, lambda: reader.legacy(file)), "legacy", reader.inert())
    except _Told:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever a damaged file leads to: each has its own in zipfile, pickle and struct
        raise ValueError(f"{path} is no torch checkpoint, or is damaged: {type(error).__name__}: {error}") from None
    raise ValueError(
        f"{path} is no torch checkpoint: it begins with {head!r}, and is neither a zip archive nor a pickle"
    )


class _Told(ValueError):
    """An error that needs no more words."""


def _refuse_foreign(reader: "_Reader", read: Callable[[], Any]) -> Any:
    """What ``read`` gives; objects that are not allowed are told even where reading fails because of them."""
    try:
        content = read()
    except Exception:
        _told_foreign(reader)
        raise
    _told_foreign(reader)
    return content


def _told_foreign(reader: "_Reader") -> None:
    names = sorted(name for name in reader.foreign if not reader.allows(name))
    if names:
        options = " ".join(f"--allow {name}" for name in names[:20])
        raise _Told(
            f"{reader.path} is refused: beside tensors it holds objects of {', '.join(names[:20])}"
            f"{f' and {len(names) - 20} more' if len(names) > 20 else ''}, whose code other programs would run to load "
            f"them. If you know what they are, convert it with\n  m2 convert ... {options}\n"
            "which leaves these objects out; their code is not run then either"
        )


class _Reader:
    def __init__(self, path: Path, allow: Collection[str]) -> None:
        self.path, self.allow, self.size = path, allow, 0
        self.foreign: set[str] = set()
        self.swapped = sys.byteorder == "big"
        self.storages: dict[str, _Storage] = {}

    def allows(self, name: str) -> bool:
        return any(name == each or (each.endswith(".*") and name.startswith(each[:-1])) for each in self.allow)

    def inert(self) -> tuple[str, ...]:
        return tuple(sorted(self.foreign))

    # -- containers ---------------------------------------------------------------------------------------------------

    def zip(self, file: Any) -> Any:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
            if len(records) != len(archive.infolist()):
                raise ValueError("two records of one name")
            pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1 or pickles[0].replace("data.pkl", "constants.pkl") in records:
                raise ValueError("a zip archive, but not one that torch.save writes for tensors")
            root = pickles[0].removesuffix("data.pkl")
            order = root + "byteorder"
            if order in records:
                self.swapped = archive.read(records[order]) != sys.byteorder.encode()
            for name, info in records.items():
                if name.startswith(root + "data/"):
                    start = self._start(file, info)
                    self.storages[name.removeprefix(root + "data/")] = _Storage(start, info.file_size, torch.uint8)
            if records[pickles[0]].file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"{pickles[0]} is larger than {MAX_PICKLE_BYTES >> 20} MiB")
            self._start(file, records[pickles[0]])
            return self._unpickle(io.BytesIO(archive.read(records[pickles[0]])), self._zip_storage)

    def _start(self, file: Any, info: zipfile.ZipInfo) -> int:
        """Of a record's bytes. Its own header is read: the lengths in it differ from those in the directory."""
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"{info.filename} is compressed or encrypted")
        file.seek(info.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if signature != _LOCAL_SIGNATURE:
            raise ValueError(f"{info.filename} is not where the directory says")
        start = info.header_offset + _LOCAL_HEADER.size + name + extra
        in_file(self.path, self.size, start, info.file_size, info.filename)
        return start

    def legacy(self, file: Any) -> Any:
        capped = Capped(file)
        if self._unpickle(capped) != _LEGACY_MAGIC or self._unpickle(capped) != _LEGACY_PROTOCOL:
            raise ValueError("a pickle, but not one of torch.save")
        machine = self._unpickle(capped)
        self.swapped = machine["little_endian"] != (sys.byteorder == "little")
        asked: dict[str, _Asked] = {}

        def storage(pid: Any) -> "_Asked":
            kind, dtype, key, _, count, view = pid
            if kind != "storage" or view is not None:
                raise ValueError("a storage of an unknown kind")
            return asked.setdefault(str(key), _Asked(_storage_type(dtype), int(count)))

        content = self._unpickle(capped, storage)
        end = file.tell()
        keys = self._unpickle(capped)
        end = file.tell()
        for key in keys:
            file.seek(end)
            (count,) = struct.unpack("<q" if machine["little_endian"] else ">q", file.read(8))
            wanted = asked[str(key)]
            length = count * wanted.dtype.itemsize
            if count != wanted.count:
                raise ValueError(f"storage {key} holds {count} numbers instead of {wanted.count}")
            in_file(self.path, self.size, end + 8, length, f"storage {key}")
            self.storages[str(key)] = wanted.place = _Storage(end + 8, length, wanted.dtype)
            end += 8 + length
        return _settle(content, self)

    # -- objects ------------------------------------------------------------------------------------------------------

    def _unpickle(self, file: Any, storage: Callable[[Any], Any] | None = None) -> Any:
        unpickler = InertUnpickler(file, self._builders(), storage)
        try:
            return unpickler.load()
        finally:
            self.foreign |= unpickler.foreign

    def _builders(self) -> dict[str, Builder]:
        builders: dict[str, Builder] = {
            "collections.OrderedDict": lambda items=(): dict(items),
            "torch.Size": lambda sizes=(): tuple(sizes),
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": lambda s, o, n, t, _g, _h, dtype, *_: self.tensor(
                s, o, n, t, dtype=dtype
            ),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        }
        for module, names in _HARMLESS:
            for name in names:
                builders[f"{module}.{name}"] = lambda *a, n=f"{module}.{name}": Inert(n, a)
        for module in ("torch", "torch.cuda", "torch.storage"):
            for name in _STORAGES:
                builders[f"{module}.{name}"] = lambda *a, n=f"{module}.{name}": Inert(n, a)
        builders["torch.nn.parameter.Parameter"] = lambda data=None, *_: data
        builders["torch._tensor._rebuild_from_type_v2"] = lambda function, _type, arguments, _state: builders[
            str(function)
        ](*arguments)
        return builders

    def _zip_storage(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        found = self.storages.get(str(key))
        if kind != "storage" or found is None:
            raise ValueError(f"the archive lacks storage {key!r}")
        typed = _Storage(found.offset, found.size, _storage_type(dtype))
        if count * typed.dtype.itemsize != found.size:
            raise ValueError(f"storage {key} holds {found.size} bytes instead of {count * typed.dtype.itemsize}")
        return typed

    def tensor(
        self, storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any, dtype: Any = None
    ) -> Any:
        """A tensor as torch rebuilds it: numbers of ``storage`` from ``offset`` on."""
        if isinstance(storage, _Asked):  # legacy: its place comes after the objects
            return _Late(storage, (offset, tuple(shape), tuple(strides)))
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without a storage")
        found = storage.dtype if dtype is None else _TYPES.get(dtype.name)
        if found is None:  # a type that no weight has
            return Inert(f"torch.{dtype.name}", ())
        shape, strides = tuple(shape), tuple(strides)
        if len(shape) != len(strides) or any(not isinstance(x, int) or x < 0 for x in (offset, *shape, *strides)):
            raise ValueError("a tensor with impossible sizes")
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides)) if all(shape) else 0
        if (offset + span) * found.itemsize > storage.size:
            raise ValueError("a tensor that reaches beyond its storage")
        if math.prod(shape) * found.itemsize > storage.size:  # expanded: whatever size it claims
            return Inert("torch.Tensor", ())
        stretch = Stretch(self.path, storage.offset + offset * found.itemsize, span)
        own = None if _row_by_row(shape, strides) else strides
        return Stored(found, shape, (stretch,), own, self.swapped and found.itemsize > 1)


@dataclass
class _Asked:
    """A storage of a legacy file, whose place is known when all objects are read."""

    dtype: torch.dtype
    count: int
    place: _Storage | None = None


@dataclass(frozen=True)
class _Late:
    storage: _Asked
    geometry: tuple[int, tuple[int, ...], tuple[int, ...]]


def _settle(content: Any, reader: _Reader, depth: int = 0) -> Any:
    """Objects of a legacy file with their tensors; those deeper than any state dictionary lies are left out."""
    if isinstance(content, _Late):
        return reader.tensor(content.storage.place, *content.geometry)
    if isinstance(content, dict) and depth < 8:
        return {key: _settle(value, reader, depth + 1) for key, value in content.items()}
    if isinstance(content, list | tuple) and depth < 8:
        return type(content)(_settle(value, reader, depth + 1) for value in content)
    return content


def _storage_type(dtype: Any) -> torch.dtype:
    if isinstance(dtype, Global) and dtype.module in ("torch", "torch.cuda", "torch.storage"):
        return _STORAGES[dtype.name]
    raise ValueError(f"storages of an unknown type {dtype}")


def _row_by_row(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
