"""Where a data set lies: a local folder, or an object store by URL through fsspec (s3://, gs://, hf://, memory:// ...).

A reader asks for whole files and for ranges of bytes, and nothing else. Of a store, what fails for a moment is tried
again, each time after a longer wait, and every request has a time limit; what does not get better is told with its URL.
"""

import contextlib
import importlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

log = logging.getLogger(__name__)

ATTEMPTS, FIRST_WAIT_S, REQUEST_S = 6, 0.25, 120.0
# Errors that another try does not change.
_FINAL = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(NotImplementedError, ImportError, TypeError),
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(::[A-Za-z][A-Za-z0-9+.\-]*)*://")

T = TypeVar("T")


class StoreError(ValueError):
    """A file of a data set that cannot be read; names it and says what to do."""


def location(place: Path | str) -> Path | str:
    """A path, or a URL without the slash at its end. Path() turns the // of a URL into /, which is undone."""
    text = str(place)
    if isinstance(place, Path):
        if not re.match(r"[A-Za-z][A-Za-z0-9+.\-]+:/[^/]", text):
            return place
        text = text.replace(":/", "://", 1)
    return text.rstrip("/") if _URL.match(text) else Path(text)


class Store(Protocol):
    """Reading from one folder. ``place``: its path or URL, for messages."""

    place: Path | str

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError, or StoreError."""

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file that has them. Raises StoreError."""

    def where(self, name: str) -> str:
        """The path or URL of a file."""


def open_store(place: Path | str) -> "LocalStore | RemoteStore":
    """Raises ValueError with the package to install where a URL's driver is missing."""
    place = location(place)
    return LocalStore(place) if isinstance(place, Path) else RemoteStore(place)


class LocalStore:
    """A folder of this machine's file systems."""

    def __init__(self, folder: Path) -> None:
        self.place: Path | str = folder
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        try:
            with open(self.path(name), "rb") as handle:
                handle.seek(start)
                content = handle.read(stop - start)
        except OSError as error:
            raise StoreError(f"{self.where(name)}: {error.strerror}") from error
        if len(content) < stop - start:
            raise StoreError(f"{self.where(name)} ends before byte {stop}: cut short")
        return content

    def size(self, name: str) -> int:
        return os.stat(self.path(name)).st_size


class RemoteStore:
    """A folder of an object store. Connections are made at first use in each process."""

    def __init__(self, url: str) -> None:
        self.place: Path | str = url
        self.url = url
        self._files: Any = None
        self._root = ""
        self._stop = threading.Event()
        self._connect()  # a missing driver shows at once

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.url = self.place = state["url"]
        self._files, self._root, self._stop = None, "", threading.Event()

    def _connect(self) -> Any:
        if self._files is None:
            # fsspec alone: each driver is a package of its own.
            core = importlib.import_module("fsspec.core")
            try:
                files, root = core.url_to_fs(self.url)
            except ImportError as error:
                raise ValueError(f"{self.url}: its driver is not installed ({error}); install that with pip") from error
            except ValueError as error:
                raise ValueError(f"{self.url}: {error}; give a folder or a URL that fsspec has a driver for") from error
            self._files, self._root = files, str(root).rstrip("/")
        return self._files

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        return self._again(name, lambda files, path: self._call(files, "cat_file", path), missing=False)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        def get(files: Any, path: str) -> bytes:
            content = self._call(files, "cat_file", path, start=start, end=stop)
            if len(content) != stop - start:
                raise OSError(f"bytes {start} to {stop} were asked for, {len(content)} came")
            return content

        return self._again(name, get)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

        def get(files: Any, path: str) -> int | None:
            try:
                return int(self._call(files, "info", path)["size"])
            except FileNotFoundError:
                return None

        return self._again(name, get)

    def put(self, name: str, content: bytes) -> None:
        def send(files: Any, path: str) -> None:
            _parents(files, path)
            self._call(files, "pipe_file", path, content)

        self._again(name, send)

    def put_file(self, source: Path, name: str) -> None:
        """Send a local file of any size; it has no limit of time."""

        def send(files: Any, path: str) -> None:
            _parents(files, path)
            files.put_file(str(source), path)

        self._again(name, send)

    def remove(self, name: str) -> None:
        def take(files: Any, path: str) -> None:
            if files.exists(path):
                files.rm_file(path)

        self._again(name, take)

    @contextlib.contextmanager
    def without_retries(self) -> Iterator[None]:
        """Inside, threads that wait for another try end with the error that they have."""
        self._stop.set()
        try:
            yield
        finally:
            self._stop.clear()

    @staticmethod
    def _call(files: Any, method: str, *arguments: Any, **named: Any) -> Any:
        """A method of the file system; those that are asynchronous inside end after REQUEST_S."""
        inner = getattr(files, f"_{method}", None)
        if getattr(files, "async_impl", False) and inner is not None and getattr(files, "loop", None) is not None:
            asynchronous = importlib.import_module("fsspec.asyn")
            return asynchronous.sync(files.loop, inner, *arguments, timeout=REQUEST_S, **named)
        return getattr(files, method)(*arguments, **named)

    def _again(self, name: str, work: Callable[[Any, str], T], *, missing: bool = True) -> T:
        """Do something to a file, up to ATTEMPTS times. ``missing``: tell of a missing file as StoreError."""
        files, where, started = self._connect(), self.where(name), time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return work(files, f"{self._root}/{name}")
            except FileNotFoundError as error:
                if not missing:
                    raise
                raise StoreError(f"{where} is missing") from error
            except _FINAL as error:
                raise StoreError(f"{where}: {type(error).__name__}: {error}") from error
            except Exception as error:
                seconds = time.monotonic() - started
                if attempt == ATTEMPTS or self._stop.is_set():
                    raise StoreError(
                        f"{where}: {attempt} tries in {seconds:.0f} s failed, the last with {type(error).__name__}: "
                        f"{error}. Look at the network, the store and the credentials, then start the same command "
                        "again: a run goes on from its newest checkpoint"
                    ) from error
                wait = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
                log.warning(
                    "%s: %s: %s; try %d of %d in %.1f s",
                    where,
                    type(error).__name__,
                    error,
                    attempt + 1,
                    ATTEMPTS,
                    wait,
                )
                self._stop.wait(wait)
        raise AssertionError


def _parents(files: Any, path: str) -> None:
    """Stores have no folders; what fsspec makes look like one and does, does."""
    files.makedirs(files._parent(path), exist_ok=True)
