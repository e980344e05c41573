"""Reading pickles without running anything that they name.

A pickle is a program: it names functions and classes and says what to call them with. Here every name becomes a
`Global`, which cannot be called, and the only things that are built are the ones of a table that the caller gives
(for torch files: descriptions of tensors). All else becomes an `Inert` object, which takes what it is given and
forgets it, and its name is noted, so that the caller can refuse it. Nothing is ever imported.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

# 32 MiB of pickle describe more than 50,000 tensors; more than that is no checkpoint of this network, and a small
# file of one-byte opcodes grows to some hundred times its size in memory.
MAX_PICKLE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a pickle, "module.name". It stands for itself and is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """In the place of an object of a foreign class: takes state and items like one, and keeps only its arguments."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...

    def add(self, value: object) -> None: ...


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class Capped:
    """A file of which no more than ``limit`` bytes are read, whatever lengths the pickle claims; it reads no ahead."""

    def __init__(self, file: io.BufferedIOBase, limit: int = MAX_PICKLE_BYTES) -> None:
        self._file, self._left = file, limit

    def read(self, size: int, /) -> bytes:
        return self._count(self._file.read(min(size, self._left)))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._left))

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


Builder = Callable[..., Any]


class InertUnpickler(pickle._Unpickler):
    """Builds plain containers and what ``builders`` make of the names in it; notes all other names in ``foreign``.

    Python's own implementation in Python: the one in C allocates what a damaged memo index or length asks for.
    """

    dispatch = dict(pickle._Unpickler.dispatch)
    for _opcode in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER):
        del dispatch[_opcode[0]]

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self, file: Readable, builders: Mapping[str, Builder], persistent: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__(file, encoding="utf-8")  # type: ignore[arg-type]
        self.builders, self.persistent = builders, persistent
        self.foreign: set[str] = set()

    def find_class(self, module: str, name: str) -> Global:
        found = Global(module, name)
        if str(found) not in self.builders:
            self.foreign.add(str(found))
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise pickle.UnpicklingError("a persistent object where none belongs")
        return self.persistent(pid)

    def build(self, function: object, arguments: object) -> Any:
        """What a call of ``function`` in the pickle gives."""
        if isinstance(function, Inert):  # what a call gave is called
            return function
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("a call of what is no name")
        builder = self.builders.get(str(function))
        return Inert(str(function), arguments) if builder is None else builder(*arguments)

    # -- opcodes that would call, set or hash -------------------------------------------------------------------------

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(self.build(function, arguments))

    def _newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments, which no builder takes
        self._reduce()

    def _inst(self) -> None:
        module, name = self.readline()[:-1].decode(), self.readline()[:-1].decode()  # type: ignore[attr-defined]
        self.append(self.build(self.find_class(module, name), tuple(self.pop_mark())))

    def _obj(self) -> None:
        function, *arguments = self.pop_mark()
        self.append(self.build(function, tuple(arguments)))

    def _build(self) -> None:
        self.stack.pop()  # attributes, which nothing here has a use for

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._items([key, value])

    def _setitems(self) -> None:
        self._items(self.pop_mark())

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._items(items)

    def _items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, Inert):
            raise pickle.UnpicklingError("items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_hashable(key)] = value

    def _additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is set:
            self.stack[-1].update(map(_hashable, items))

    def _frozenset(self) -> None:
        self.append(frozenset(map(_hashable, self.pop_mark())))

    _own: dict[int, Any] = {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.NEWOBJ_EX[0]: _newobj_ex,
        pickle.INST[0]: _inst,
        pickle.OBJ[0]: _obj,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozenset,
    }
    dispatch.update(_own)


def _hashable(key: object) -> Any:
    """Deep tuples are refused, because hashing one overruns the interpreter's stack."""
    parts = key if type(key) is tuple else (key,)
    if all(isinstance(part, str | int | float | bytes | Global | Inert | None) for part in parts):
        return key
    raise pickle.UnpicklingError("a dictionary's key is no plain value")


def is_pickle(head: bytes) -> bool:
    """Whether a file that starts with ``head`` can be a pickle of protocol 2 or newer."""
    return len(head) > 1 and head[:1] == pickle.PROTO and head[1] <= pickle.HIGHEST_PROTOCOL
