"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_S = 5.0
T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Pass items through and show how many of `total` have come; `what` names the work. Writes to stderr."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            yield from progress.track(items, total=total, description=what)
        return
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S:
            print(f"{what}: {done}{f' of {total}' if total else ''}, {now - start:.0f} s", file=sys.stderr, flush=True)
            last = now
    print(f"{what}: {done} in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
