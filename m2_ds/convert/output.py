"""A folder that appears as a whole, can be gone on with after a kill, and lists the checksums of its files.

.OUT.part/       what is written so far
.OUT.part.json   which of its files are finished, and of which conversion they are
.OUT.removed/    what was at OUT before, until it is gone
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.filesize import decimal

from m2_ds.convert.formats import Writer
from m2_ds.convert.run_folder import CHECKSUMS
from m2_ds.files import publish, sync, write_json

log = logging.getLogger(__name__)


def refuse_existing(out: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    """Raises ValueError where ``out`` is in the way, or is not what this module wrote and could be lost."""
    inside = out.resolve()
    if any(inside == path.resolve() or inside in path.resolve().parents for path in sources):
        raise ValueError(f"{out} holds the source: give another folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: OUT is the folder that the weights are written to")
    if not overwrite:
        raise ValueError(f"{out} exists: give another folder, or --overwrite to replace it when the new one is whole")
    try:
        listed = {*json.loads((out / CHECKSUMS).read_bytes()), CHECKSUMS}
    except (OSError, ValueError, TypeError):
        raise ValueError(f"{out} was not written by a conversion (no {CHECKSUMS}): remove it yourself") from None
    found = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    if others := sorted(found - listed):
        raise ValueError(f"{out} holds files that no conversion wrote ({', '.join(others[:5])}): move them first")


class Output:
    """Use as a context. After a kill, or on a full disk, what was finished is kept for the next time, else removed.

    ``fingerprint``: of the source and all settings; finished files of another one are thrown away. ``tell``: gets bytes
    as they are written.
    """

    def __init__(self, out: Path, fingerprint: str, overwrite: bool, tell: Callable[[int], object]) -> None:
        self.out, self.fingerprint, self.overwrite, self.tell = out, fingerprint, overwrite, tell
        self.aside = out.with_name(f".{out.name}.part")
        self.journal = out.with_name(f".{out.name}.part.json")
        self.removed = out.with_name(f".{out.name}.removed")
        self.finished: dict[str, dict[str, Any]] = {}
        self._thread = ThreadPoolExecutor(1)
        self._sealing: Future[None] | None = None

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.aside.mkdir(exist_ok=True)
            self._lock = os.open(self.aside, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{self.aside} cannot be made: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ValueError(f"{self.out} is being written by another process") from None
        if self.removed.exists() and not self.out.exists():  # killed between the two renames of `publish`
            self.removed.rename(self.out)
        shutil.rmtree(self.removed, ignore_errors=True)
        self._find_finished()
        return self

    def _find_finished(self) -> None:
        try:
            found = json.loads(self.journal.read_bytes())
            if found["fingerprint"] != self.fingerprint:
                log.warning("%s is of another source or of other settings: it is thrown away", self.aside)
            else:
                self.finished = {
                    name: facts
                    for name, facts in found["files"].items()
                    if (self.aside / name).stat().st_size == facts["bytes"]
                }
        except (OSError, ValueError, KeyError, TypeError):
            self.finished = {}
        for path in self.aside.iterdir():
            if path.name not in self.finished:
                path.unlink()

    def reserve(self, total: int) -> None:
        """Refuse now what the disk has no room for: files of ``total`` bytes, the finished ones included."""
        needed = total - sum(facts["bytes"] for facts in self.finished.values())
        free = shutil.disk_usage(self.aside).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{decimal(needed)} are needed, {decimal(free)} are free")

    def weights(self, name: str, write: Writer) -> None:
        """A large file; one that is finished already is left as it is."""
        if name in self.finished:
            self.tell(self.finished[name]["bytes"])
            return
        with HashedFile(self.aside / name, self.tell) as file:
            write(file)
        self._wait()
        self._sealing = self._thread.submit(self._seal, name, {"sha256": file.digest, "bytes": file.written})

    def _seal(self, name: str, facts: dict[str, Any]) -> None:
        """In a thread, while the next file is written."""
        sync(self.aside / name)
        self.finished[name] = facts
        write_json(self.journal, {"fingerprint": self.fingerprint, "files": self.finished})

    def _wait(self) -> None:
        """For the file before."""
        if self._sealing is not None:
            self._sealing.result()

    def put(self, name: str, content: bytes) -> None:
        """A small file, after all large ones."""
        self._wait()
        path = self.aside / name
        path.write_bytes(content)
        sync(path)
        self.finished[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}

    def publish(self) -> dict[str, str]:
        """Make the folder appear; the SHA-256 of its files."""
        self._wait()
        checksums = {name: facts["sha256"] for name, facts in sorted(self.finished.items())}
        write_json(self.aside / CHECKSUMS, checksums)
        if self.overwrite and self.out.exists():
            self.out.rename(self.removed)
        publish(self.aside, self.out)
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.removed, ignore_errors=True)
        return checksums

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown()
        os.close(self._lock)
        if isinstance(error, ValueError) or (isinstance(error, OSError) and not self.finished):
            shutil.rmtree(self.aside, ignore_errors=True)
            self.journal.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ValueError(
                f"{self.aside} cannot be written: {error.strerror or error}. Look at free space, quota and rights; "
                "the same command then goes on with the files that are finished"
            ) from None


class HashedFile:
    """A new file that is written once from beginning to end, its SHA-256 taken on the way by a thread."""

    def __init__(self, path: Path, tell: Callable[[int], object]) -> None:
        self.written, self.digest, self._tell = 0, "", tell
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None

    def write(self, data: memoryview | bytes, /) -> int:
        left = memoryview(data).cast("B")
        if self._hashing is not None:
            self._hashing.result()
        self._hashing = self._thread.submit(self._hash.update, left)  # while the kernel takes them
        while left:
            left = left[self._file.write(left) :]
        size = memoryview(data).nbytes
        self.written += size
        self._tell(size)
        return size

    def flush(self) -> None:
        """Nothing is held back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        self._file.close()
        self.digest = self._hash.hexdigest()
