"""Vectors of many rows, in batches that are the same whatever the number of processes, and kept as they come.

A batch is computed by one process as a whole. Which rows share it does not depend on how many processes there are or on
what an earlier, killed evaluation left: so the numbers do not either.

Legend: n rows in all, b rows of a batch, E embedding.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from m2_ds.data.progress import track
from m2_ds.evaluation.cache import Store, Vectors
from m2_ds.parallel.collectives import all_gather_rows, barrier, broadcast_object
from m2_ds.parallel.mesh import SOLO, Group

T = TypeVar("T")


def compute(
    batches: Sequence[Sequence[int]],
    load: Callable[[Sequence[int]], T],
    encode: Callable[[T], tuple[Tensor, Tensor]],
    *,
    what: str,
    threads: int = 1,
    group: Group = SOLO,
    store: Store | None = None,
) -> Vectors:
    """Vectors of all rows 0 .. n - 1 in order, on the CPU of every rank of ``group``, each of which must call it.

    ``batches`` share out the rows. ``load`` runs ahead in threads; ``encode`` gives features fp32 [b, E] and marks
    int64 [b]. With a ``store``, rows that it holds are not computed, and new ones are put there.
    """
    count = sum(map(len, batches))
    held = broadcast_object(store.load() if store is not None and group.is_first else None, group)
    known = torch.zeros(count, dtype=torch.bool)
    if held is not None:
        known[held.rows] = True
    left = [batch for batch in batches if not bool(known[list(batch)].all())]
    found = _compute(left, load, encode, what, threads, group, store) if left else []
    parts = [*([held] if held is not None else []), *found]
    rows, features, marks = (torch.cat(columns) for columns in zip(*parts))
    order = torch.empty(count, dtype=torch.int64)
    order[rows] = torch.arange(len(rows))
    whole = Vectors(torch.arange(count), features[order], marks[order])
    if store is not None and left:
        barrier(group)  # nobody writes parts any more
        if group.is_first:
            store.finish(whole)
    return whole


def _compute(
    batches: Sequence[Sequence[int]],
    load: Callable[[Sequence[int]], T],
    encode: Callable[[T], tuple[Tensor, Tensor]],
    what: str,
    threads: int,
    group: Group,
    store: Store | None,
) -> list[Vectors]:
    rounds = -(-len(batches) // group.size)
    # Ranks at the end repeat the last batch: partitioned weights need every rank to run as often as the others.
    mine = [min(turn * group.size + group.rank, len(batches) - 1) for turn in range(rounds)]
    width = max(map(len, batches))
    features, marks = [], []
    with torch.no_grad(), ThreadPoolExecutor(threads) as pool:
        loaded = _ahead(pool, load, [batches[number] for number in mine], threads + 1)
        shown = track(loaded, f"embedding {what} (batches)", total=rounds) if group.is_first else loaded
        try:
            for turn, (inputs, number) in enumerate(zip(shown, mine)):  # in this order `shown` is read to its end
                vectors, numbers = encode(inputs)
                if store is not None and number == turn * group.size + group.rank:
                    store.add(Vectors(torch.tensor(batches[number]), vectors, numbers))
                rest = width - len(vectors)
                features.append(pad(vectors, (0, 0, 0, rest)))
                marks.append(pad(numbers.to(vectors.device), (0, rest)))
        except BaseException:
            if store is not None:
                store.flush()
            raise
    joined = all_gather_rows(torch.stack(features), group, "embeddings").cpu()
    told = all_gather_rows(torch.stack(marks), group, "embeddings").cpu()
    found = []
    for number, batch in enumerate(batches):
        turn, rank = divmod(number, group.size)
        place = rank * rounds + turn
        found.append(Vectors(torch.tensor(batch), joined[place, : len(batch)], told[place, : len(batch)]))
    return found


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[Sequence[int]], T], batches: Sequence[Sequence[int]], depth: int
) -> Iterator[T]:
    """Results in order, `depth` of them in the making."""
    waiting: deque[Future[T]] = deque()
    for batch in batches:
        waiting.append(pool.submit(load, batch))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
