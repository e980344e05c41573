"""Headers of safetensors files, read and written: where each tensor lies.

The length of the header as uint64, the header (JSON: name -> type, shape, begin and end of the tensor behind the
header), then the tensors without gaps.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from m2_ds.convert.stored import Stored, Stretch, in_file

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100 << 20  # as the safetensors library has it
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file, in the order in which they lie there. Raises ValueError that names the file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(_LENGTH.size)
            in_file(path, size, 0, _LENGTH.size, "the header's length")
            (length,) = _LENGTH.unpack(head)
            if length > _MAX_HEADER:
                raise ValueError(f"{path} is no safetensors file, or is damaged: a header of {length} bytes")
            in_file(path, size, _LENGTH.size, length, "the header")
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        entries = json.loads(text, object_pairs_hook=_once)
        entries.pop("__metadata__", None)
        found = {name: _entry(path, size, _LENGTH.size + length, name, fields) for name, fields in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    ends = _LENGTH.size + length
    for name, stored in sorted(found.items(), key=lambda item: _place(item[1])):
        if _place(stored)[0] != ends:
            raise ValueError(f"{path} is damaged: {name} does not begin where the tensor before it ends")
        ends += stored.nbytes
    if ends != size:
        raise ValueError(f"{path} is cut or damaged: its tensors end at byte {ends} of {size}")
    return dict(sorted(found.items(), key=lambda item: _place(item[1])))


def _place(stored: Stored) -> tuple[int, int]:
    return stored.stretches[0].offset, stored.nbytes


def _entry(path: Path, size: int, base: int, name: str, fields: Any) -> Stored:
    dtype, shape, (begin, end) = _TYPES[fields["dtype"]], tuple(fields["shape"]), fields["data_offsets"]
    if any(type(x) is not int or x < 0 for x in (*shape, begin, end)):
        raise ValueError(f"{name} has impossible sizes")
    count = math.prod(shape)
    if end - begin != count * dtype.itemsize:
        raise ValueError(f"{name} has {end - begin} bytes for {count} numbers of {fields['dtype']}")
    in_file(path, size, base + begin, end - begin, name)
    return Stored(dtype, shape, (Stretch(path, base + begin, count),))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def header(outlines: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """What comes before the tensors, which have to follow in the same order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in outlines.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    return _LENGTH.pack(len(text)) + text
