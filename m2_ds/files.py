"""Files that are whole or absent: written aside, synced to disk, renamed into place."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO


def sync(path: Path) -> None:
    """Force a file's or folder's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, path: Path) -> None:
    """Rename a finished file or folder into place, so that it survives a crash of the machine from here on."""
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(content)
    publish(aside, path)


def write_json(path: Path, content: object) -> None:
    """JSON for people to read, written atomically."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


class Lines:
    """A file that lines are appended to. An error cuts it back to whole lines, and the next line opens it anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._torn = False  # it ends in a part of a line that could not be cut off

    def append(self, line: str) -> None:
        """Raises OSError where it cannot be written."""
        whole: int | None = None
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            whole = os.path.getsize(self.path)
            left = (b"\n" if self._torn else b"") + line.encode() + b"\n"
            while left:
                left = left[self._file.write(left) :]
            self._torn = False
        except OSError:
            self.close()
            if whole is not None:
                try:
                    os.truncate(self.path, whole)
                except OSError:
                    self._torn = True
            raise

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
