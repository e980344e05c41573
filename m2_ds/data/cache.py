"""A cache of pieces of remote shards on a local disk, of bounded size, shared by the processes of a machine.

    folder/ab/ab12...-00017      bytes 17 of the shard with that SHA-256 (a row group, or its footer), then their digest
    folder/.size, .lock, .locks/ bookkeeping

A piece is named by the checksum of its shard, so that it can never be one of an older data set. It ends with a digest
of name and content: a piece that was torn by a crash or changed on disk is found when it is read, and fetched again.
That is also why nothing is synced. Pieces that were used longest ago leave first. Locks are the kernel's: those of a
process that is killed are gone with it.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_DIGEST = 16
_STRIPES = 1024  # locks of single pieces; two that share one wait for each other, no more
_KEEP = 0.9  # share of the bound that is left when pieces leave: making room costs a look at all of them
_STALE_S = 3600.0  # an unfinished piece of this age belongs to a process that is gone


class DiskCache:
    """Pieces of bytes by name. Threads and processes may share a folder.

    Args:
        folder: made if missing; nothing else may lie there.
        max_bytes: pieces of all processes together.

    Raises:
        ValueError: a folder that cannot be written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._full_told = False
        try:
            (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
            with self._locked(self.folder / ".lock"):
                pass
        except OSError as error:
            raise ValueError(
                f"data.cache_folder: {self.folder} cannot be written ({error.strerror}); give a folder on a local disk "
                "that this user may write"
            ) from error

    def get(self, name: str) -> bytes | None:
        """The piece of that name; None where there is none that is whole."""
        path = self._path(name)
        try:
            content = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        body, digest = content[:-_DIGEST], content[-_DIGEST:]
        if digest == _digest(name, body):
            return body
        log.warning("%s is damaged: it is fetched again", path)
        path.unlink(missing_ok=True)
        return None

    def get_or_fetch(self, name: str, fetch: Callable[[], bytes], *, wait: bool = True) -> bytes | None:
        """The piece, fetched and kept where it is not here; a piece is fetched by one process at a time.

        ``wait``: for another process that is fetching it; otherwise None then.
        """
        if (found := self.get(name)) is not None:
            return found
        stripe = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) % _STRIPES
        with self._locked(self.folder / ".locks" / f"{stripe:03x}", wait=wait) as mine:
            if not mine:
                return None
            if (found := self.get(name)) is None:
                found = fetch()
                self._put(name, found)
            return found

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _put(self, name: str, body: bytes) -> None:
        """Keep a piece, if it has room and the disk takes it."""
        size = len(body) + _DIGEST
        if size > self.max_bytes:
            return
        path = self._path(name)
        aside = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            self._reserve(size)
            aside.write_bytes(body + _digest(name, body))
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            if not self._full_told:
                self._full_told = True
                log.warning("data.cache_folder: %s: %s; what does not fit is not kept", self.folder, error)

    def _reserve(self, size: int) -> None:
        """Count bytes that will be written; where they do not fit, the oldest pieces leave.

        A process that dies between counting and writing leaves too high a count, which the next look at the files puts
        right.
        """
        with self._locked(self.folder / ".lock"):
            book = self.folder / ".size"
            try:
                total = int(book.read_text())
            except (FileNotFoundError, ValueError):
                total = self._make_room(self.max_bytes - size)  # also: how much there is
            if total + size > self.max_bytes:
                total = self._make_room(min(int(_KEEP * self.max_bytes), self.max_bytes - size))
            book.write_text(str(total + size))

    def _make_room(self, left: int) -> int:
        """Remove the pieces used longest ago until at most ``left`` bytes are there; the bytes that are."""
        entries, total, now = [], 0, time.time()
        for folder in os.scandir(self.folder):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            for entry in os.scandir(folder.path):
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat()
                    stale = entry.name.startswith(".") and now - about.st_mtime > _STALE_S
                    entries.append((0.0 if stale else about.st_mtime, about.st_size, entry.path))
                    total += about.st_size
        for moment, size, path in sorted(entries):
            if total <= left and moment > 0:
                break
            if not os.path.basename(path).startswith(".") or moment == 0:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size
        return total

    @contextlib.contextmanager
    def _locked(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        """Hold a lock among processes and threads; False where it is taken and ``wait`` is not."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)


def _digest(name: str, body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST, key=hashlib.blake2b(name.encode()).digest()).digest()
