"""Bytes from elsewhere: input files that are URLs, and pictures that records name by URL, in bounded time and size."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fsspec
import requests

from m2_ds.prepare.config import FetchConfig
from m2_ds.prepare.pairs import Drop
from m2_ds.prepare.readers import BrokenShard
from m2_ds.prepare.units import is_remote

_CHUNK = 1 << 16
_FINAL = (400, 401, 403, 404, 405, 410, 451)  # answers that another try would not change


@contextlib.contextmanager
def local_file(file: str, retries: int) -> Iterator[Path]:
    """A file on this machine: itself, or a copy of what a URL names, gone afterwards.

    Raises:
        FileNotFoundError: it is not there.
        BrokenShard: it could not be copied, after `retries` further attempts.
    """
    if not is_remote(file):
        if not Path(file).exists():
            raise FileNotFoundError(file)
        yield Path(file)
        return
    folder = Path(tempfile.mkdtemp(prefix="m2-prepare-"))
    try:
        path = folder / file.rsplit("/", 1)[-1]
        for attempt in range(retries + 1):
            try:
                with fsspec.open(file, "rb") as remote, open(path, "wb") as here:
                    shutil.copyfileobj(remote, here, 1 << 20)
                break
            except FileNotFoundError:
                raise
            except Exception as error:  # every driver has its own exceptions
                if attempt == retries:
                    raise BrokenShard(f"can't be copied here: {type(error).__name__}: {error}") from error
                time.sleep(min(30.0, 2.0**attempt))
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch_pictures(urls: Sequence[str], config: FetchConfig, max_bytes: int) -> list[bytes | Drop]:
    """The bytes behind each URL, or why there are none, in order."""
    with ThreadPoolExecutor(config.threads) as pool, requests.Session() as session:
        return list(pool.map(partial(_fetch, session=session, config=config, max_bytes=max_bytes), urls))


def _fetch(url: str, session: requests.Session, config: FetchConfig, max_bytes: int) -> bytes | Drop:
    protocol = url.partition("://")[0].lower()
    if protocol not in config.protocols:
        return Drop("not_fetched", f"{protocol or 'no'} protocol is not among {', '.join(config.protocols)}: {url}")
    why = ""
    for attempt in range(config.retries + 1):
        if attempt:
            time.sleep(min(5.0, 0.5 * 2.0**attempt))
        try:
            if protocol not in ("http", "https"):
                with fsspec.open(url, "rb") as remote:
                    data = remote.read(max_bytes + 1)
                return data if len(data) <= max_bytes else _too_large(max_bytes, url)
            return _http(url, session, config, max_bytes)
        except _HttpError as error:
            why = str(error)
            if error.final:
                break
        except Exception as error:  # requests', urllib3's and every driver's own
            why = f"{type(error).__name__}: {error}"
    return Drop("not_fetched", f"{why}: {url}")


class _HttpError(Exception):
    def __init__(self, text: str, final: bool) -> None:
        super().__init__(text)
        self.final = final


def _too_large(max_bytes: int, url: str) -> Drop:
    return Drop("too_many_bytes", f"more than {max_bytes:,} bytes: {url}")


def _http(url: str, session: requests.Session, config: FetchConfig, max_bytes: int) -> bytes | Drop:
    end = time.monotonic() + config.seconds
    headers = {"User-Agent": config.user_agent}
    with session.get(url, headers=headers, timeout=config.seconds, stream=True) as answer:
        if answer.status_code != 200:
            raise _HttpError(f"HTTP status {answer.status_code}", answer.status_code in _FINAL)
        if int(answer.headers.get("Content-Length") or 0) > max_bytes:
            return _too_large(max_bytes, url)
        chunks, size = [], 0
        for chunk in answer.iter_content(_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                return _too_large(max_bytes, url)
            if time.monotonic() > end:  # `timeout` bounds the silence between packets, not the whole
                raise _HttpError(f"more than {config.seconds:g} s", False)
        return b"".join(chunks)
