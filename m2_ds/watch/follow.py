"""Files of JSON lines that somebody else writes: what is new in them, and the numbers as columns."""

import json
import math
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

COMPARED_BYTES = 256  # before the place that was read up to: a file that was written anew differs there
MAX_COLUMNS = 500
LARGEST = 1e300
SHOWN = 60  # characters of a damaged line


class Tail:
    """Whole lines that were added to a file since the last call; a file that was cut or replaced is read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0.0  # when the file was last written, seconds since 1970; 0: never seen
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._before = b""

    def read(self) -> tuple[bool, list[str]]:
        """(whether the lines are those from the beginning, lines). A last line without its end waits for it.

        Raises OSError where there is a file that cannot be read; one that is not there has no lines.
        """
        try:
            with open(self.path, "rb") as handle:
                status = os.fstat(handle.fileno())
                self.written = status.st_mtime
                anew = self._file != (status.st_dev, status.st_ino) or not self._goes_on(handle, status.st_size)
                if anew:
                    self._file, self._offset, self._before = (status.st_dev, status.st_ino), 0, b""
                handle.seek(self._offset)
                content = handle.read()
        except (FileNotFoundError, NotADirectoryError):
            anew = self._file is not None
            self._file, self._offset, self._before = None, 0, b""
            return anew, []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._before = (self._before + whole)[-COMPARED_BYTES:]
        return anew, whole.decode("utf-8", "replace").split("\n")[:-1]

    def _goes_on(self, handle: Any, size: int) -> bool:
        if size < self._offset:
            return False
        handle.seek(self._offset - len(self._before))
        return bool(handle.read(len(self._before)) == self._before)


class Records:
    """The JSON objects of a `Tail` that tell their step; lines that are none are counted, and the last told."""

    def __init__(self, path: Path) -> None:
        self.tail = Tail(path)
        self.damaged, self.example = 0, ""
        self._lines = 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether they are those from the beginning, new objects, their ``step`` an int)."""
        anew, lines = self.tail.read()
        if anew:
            self.damaged, self.example, self._lines = 0, "", 0
        found = []
        for line in lines:
            self._lines += 1
            if not line.strip():
                continue
            record = _record(line)
            if record is None:
                self.damaged += 1
                self.example = f"line {self._lines}: {line[:SHOWN]!r}"
            else:
                found.append(record)
        return anew, found


def _record(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        step = entry["step"]
        if isinstance(step, bool) or int(step) != step or step < 0:
            return None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return {**entry, "step": int(step)}


def numbers(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Finite numbers of an entry, nested ones under joined names: ``skipped/broken``."""
    for name, value in entry.items():
        if isinstance(value, dict) and not prefix:
            yield from numbers(value, f"{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST:  # NaN is not
            yield prefix + name, float(value)


class Columns:
    """Numbers of many lines, a column a name; NaN where a line has none."""

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self._columns if name.startswith(prefix)]

    def append(self, entry: dict[str, Any]) -> None:
        """Rows from the entry's step on are dropped first: a run that goes on writes them again."""
        keep = self._length
        while keep and self._columns["step"][keep - 1] >= entry["step"]:
            keep -= 1
        if keep < self._length:
            for column in self._columns.values():
                del column[keep:]
            self._length = keep
        for name, value in numbers(entry):
            if name not in self._columns:
                if len(self._columns) >= MAX_COLUMNS:
                    continue
                self._columns[name] = array("d", [math.nan]) * self._length
            self._columns[name].append(value)
        self._length += 1
        for column in self._columns.values():
            if len(column) < self._length:
                column.append(math.nan)

    def get(self, name: str) -> np.ndarray:
        """[rows] float64, a copy."""
        column = self._columns.get(name)
        return np.full(self._length, math.nan) if column is None else np.array(column, dtype=np.float64)

    def last(self, name: str) -> float | None:
        """Of the newest line; None where it has no such number."""
        column = self._columns.get(name)
        return None if not column or math.isnan(column[-1]) else column[-1]


def thin(values: np.ndarray, points: int) -> np.ndarray:
    """Rows of a column to draw: all finite ones, or the least and the largest of each of ``points`` / 2 stretches.

    The first and the last are always among them, so that a spike of one line is seen however long the run.
    """
    rows = np.flatnonzero(np.isfinite(values))
    if len(rows) <= points:
        return rows
    kept = {int(rows[0]), int(rows[-1])}
    for stretch in np.array_split(rows, max(1, points // 2 - 1)):
        kept |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    return np.array(sorted(kept))
