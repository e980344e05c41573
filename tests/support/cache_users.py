"""Processes that use one cache on disk at the same time. A file of its own, without torch: they start at once."""

import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from m2_ds.data.cache import DiskCache
from m2_ds.data.reader import open_dataset
from tests.support.web import WebFileSystem


def read_all(url: str, cache: Path, bound: int, seed: int, results: Any) -> None:
    """Read a row of every row group of seven, in an order of its own; tell whether each was right."""
    fsspec.register_implementation("web", WebFileSystem, clobber=True)
    split = open_dataset(url).split("train", 1, DiskCache(cache, bound), read_ahead=2)
    rows = np.random.default_rng(seed).permutation(np.arange(seed, len(split), 7)).tolist()
    split.ahead(range(split.index.row_groups))
    results.put([found.key for found in split.read(rows)] == [f"pair/{row}" for row in rows])
    split.close()


def fetch_forever(folder: Path, ready: Any) -> None:
    """Begin to fetch a piece, and never end."""

    def forever() -> bytes:
        ready.set()
        time.sleep(60)
        return b""

    DiskCache(folder, 10_000).get_or_fetch("ab-1", forever)
