"""Tensors that lie in files: where, of which type and shape. They are read in pieces, never mapped.

Mapped pages would count as this process's memory until the kernel takes them back; what is read here is freed.
"""

import io
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

CHUNK_BYTES = 4 << 20  # small enough to stay in a cache between reading, hashing and writing
_AHEAD_BYTES = 16 << 20
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Stretch:
    """``count`` numbers in a row from byte ``offset`` on."""

    path: Path
    offset: int
    count: int


@dataclass(frozen=True)
class Stored:
    """A tensor whose numbers, row by row, are the ``stretches`` one after another.

    With ``strides`` (in numbers) there is one stretch, and numbers lie in it as in torch. ``swapped``: each number's
    bytes are in the other order than this machine's.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stretches: tuple[Stretch, ...]
    strides: tuple[int, ...] | None = None
    swapped: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def part(self, start: int, shape: tuple[int, ...]) -> "Stored":
        """The numbers from ``start`` on, in the order of rows, as a tensor of another shape."""
        assert self.strides is None
        left, found = math.prod(shape), []
        for stretch in self.stretches:
            skipped = min(start, stretch.count)
            taken = min(left, stretch.count - skipped)
            if taken:
                offset = stretch.offset + skipped * self.dtype.itemsize
                found.append(Stretch(stretch.path, offset, taken))
            start, left = start - skipped, left - taken
        if left:
            raise ValueError(f"{_names(self.stretches)} hold {left} numbers fewer than their sizes say")
        return replace(self, shape=shape, stretches=tuple(found))

    def chunks(self, dtype: torch.dtype | None = None, limit: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """All numbers in the order of rows, in flat tensors of at most ``limit`` bytes of what is stored.

        Raises ValueError that names the file where it ends early or cannot be read.
        """
        each = max(1, limit // self.dtype.itemsize)
        if self.strides is not None:  # in any order: all of what they lie in at once
            (stretch,) = self.stretches
            with _opened(stretch.path) as file:
                span = self._load(file, stretch.offset, stretch.count)
            for chunk in span.as_strided(self.shape, self.strides).reshape(-1).split(each):
                yield chunk if dtype is None else chunk.to(dtype)
            return
        for stretch in self.stretches:
            with _opened(stretch.path) as file:
                for first in range(0, stretch.count, each):
                    offset = stretch.offset + first * self.dtype.itemsize
                    chunk = self._load(file, offset, min(each, stretch.count - first))
                    yield chunk if dtype is None else chunk.to(dtype)

    def read(self) -> Tensor:
        """The whole tensor in memory."""
        parts = [torch.empty(0, dtype=self.dtype), *self.chunks(limit=sys.maxsize)]
        return (parts[1] if len(parts) == 2 else torch.cat(parts)).reshape(self.shape)

    def mapped(self, maps: dict[Path, torch.UntypedStorage]) -> Tensor:
        """The tensor in memory that is mapped to its file; in ordinary memory where the file's layout forbids it.

        ``maps``: of the files so far.
        """
        size = self.dtype.itemsize
        if len(self.stretches) != 1 or self.swapped or self.stretches[0].offset % size:
            return self.read()
        (stretch,) = self.stretches
        if stretch.path not in maps:
            whole: Any = torch.UntypedStorage.from_file(str(stretch.path), False, stretch.path.stat().st_size)
            maps[stretch.path] = whole
        bounds = slice(stretch.offset, stretch.offset + stretch.count * size)
        flat = torch.empty(0, dtype=self.dtype).set_(maps[stretch.path][bounds])  # type: ignore[call-overload]
        return flat.view(self.shape) if self.strides is None else flat.as_strided(self.shape, self.strides)

    def _load(self, file: io.FileIO, offset: int, count: int) -> Tensor:
        raw = torch.empty(count * self.dtype.itemsize, dtype=torch.uint8)
        view = memoryview(cast(Any, raw.numpy()))
        try:
            file.seek(offset)
            if hasattr(os, "posix_fadvise"):  # what comes next, mostly the next tensor, is read in the meantime
                os.posix_fadvise(file.fileno(), offset + len(view), _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            while view:
                done = file.readinto(view)
                if not done:
                    raise ValueError(f"{file.name} ends early: it was cut, or changed while it was read")
                view = view[done:]
        except OSError as error:
            raise ValueError(f"{file.name} cannot be read: {error}") from None
        if self.swapped:
            raw = raw.view(-1, self.dtype.itemsize).flip(1).reshape(-1)
        return raw.view(self.dtype)


def _opened(path: Path) -> io.FileIO:
    try:
        return io.FileIO(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def in_file(path: Path, size: int, offset: int, length: int, what: str) -> None:
    """Raises ValueError where ``length`` bytes from ``offset`` on are not all in a file of ``size`` bytes."""
    if offset < 0 or length < 0 or offset + length > size:
        raise ValueError(f"{path} is cut or damaged: {what} is said to end at byte {offset + length} of {size}")


def _names(stretches: tuple[Stretch, ...]) -> str:
    names = dict.fromkeys(str(stretch.path) for stretch in stretches)
    return ", ".join(list(names)[:3]) + (" ..." if len(names) > 3 else "")
