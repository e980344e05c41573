"""Progress of long writing: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from m2_ds.data.progress import PLAIN_EVERY_S


@contextlib.contextmanager
def bytes_written(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Gives a function that is told how many more bytes were written. Shows ``what`` and how far it is on stderr."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task(what, total=total)
            yield lambda size: progress.advance(task, size)
        return
    start = last = time.monotonic()
    done = 0

    def tell(size: int) -> None:
        nonlocal done, last
        done += size
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S:
            speed = decimal(int(done / (now - start)))
            print(f"{what}: {decimal(done)} of {decimal(total)}, {speed}/s", file=sys.stderr, flush=True)
            last = now

    yield tell
