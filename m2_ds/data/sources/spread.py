"""One function over many items, on all cores, results in order."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import TypeVar

from m2_ds.data.memory import keep_freed_memory
from m2_ds.data.progress import track

Item = TypeVar("Item")
Result = TypeVar("Result")


def _over(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [function(item) for item in items]


def spread(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    what: str,
    *,
    workers: int | None = None,
    chunk: int = 16,
    total: int | None = None,
) -> Iterator[Result]:
    """function(item) for every item, in order, with progress under the name `what`.

    Items are taken as they are needed: a few chunks a worker are under way at a time.

    Args:
        function: picklable; its module is imported afresh in the workers.
        workers: processes; None takes one a core this process may use; 1 works in this process.
        chunk: items handed over at a time.
        total: number of items, for progress.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    workers = workers or len(os.sched_getaffinity(0))
    if total is not None:
        workers = max(1, min(workers, total // chunk))
    results = map(function, items) if workers == 1 else _in_processes(function, items, workers, chunk)
    yield from track(results, what, total=total)


def _in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, chunk: int
) -> Iterator[Result]:
    chunks = iter(items)
    pending: deque[Future[list[Result]]] = deque()
    # Started afresh, not forked: a copy of a process with running threads may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), keep_freed_memory) as pool:
        while True:
            while len(pending) < 4 * workers and (some := list(islice(chunks, chunk))):
                pending.append(pool.submit(_over, function, some))
            if not pending:
                return
            yield from pending.popleft().result()
