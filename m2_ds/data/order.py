"""Which pair stands at which place of the stream: a pure function of (seed, slot), the same for any number of ranks.

Slot = step * global_batch + place in the global batch. Three stages:

1. Mixing. In every window of M slots each source has the same number of places, by largest remainder of its weight; a
   permutation of the window says where they lie. So a source's running position is known without counting.
2. Shuffling. A source is read in epochs. An epoch permutes the row groups and then the rows inside every run of W
   permuted row groups: each row comes once an epoch, and only W row groups are in use at a time.
3. Everything else about a pair (language, caption, augmentation) is hashed from (seed, slot) by its user.

Shapes: N slots asked for at once; M slots of a mixing window.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from m2_ds.data import randomness

T = TypeVar("T")


class Places(NamedTuple):
    """Where pairs come from: source, epoch and row, each int64 [N]."""

    source: np.ndarray
    epoch: np.ndarray
    row: np.ndarray


def window_counts(weights: Sequence[float], window: int) -> np.ndarray:
    """Places of each source in a mixing window, int64 [sources], by largest remainder; they add up to the window.

    Raises:
        ValueError: a source whose weight is too small to have a place.
    """
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * window
    counts = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[: window - counts.sum()]] += 1
    if not counts.all():
        source = int(np.argmin(counts))
        raise ValueError(
            f"sources.{source}: its weight gives it no place among {window} pairs; make the weight or "
            f"mixing_window larger (at least {int(np.ceil(sum(weights) / weights[source]))})"
        )
    return counts


class _Kept(Generic[T]):
    """The last few results of a function; per instance, so that they are freed with their owner, and picklable."""

    def __init__(self, make: Callable[..., T], size: int) -> None:
        self.make, self.size = make, size
        self.results: OrderedDict[tuple[int, ...], T] = OrderedDict()

    def __call__(self, *key: int) -> T:
        if key in self.results:
            self.results.move_to_end(key)
            return self.results[key]
        result = self.results[key] = self.make(*key)
        if len(self.results) > self.size:
            self.results.popitem(last=False)
        return result


class SourceOrder:
    """Stage 2 for one source: running position to (epoch, row).

    Args:
        group_sizes: rows of each row group of the source.
        source: number of the source in the mixture; sources of equal shape are shuffled differently.
        groups: row groups W whose rows are shuffled together.
    """

    def __init__(self, group_sizes: Sequence[int], *, seed: int, source: int, groups: int) -> None:
        self.sizes = np.asarray(group_sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.rows = int(self.starts[-1])
        self.seed, self.source, self.groups = seed, source, groups
        self._epochs = _Kept(self._epoch, 2)
        self._runs = _Kept(self._run, 4)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(row groups in their order, first position of every run of W groups and the end)."""
        order = randomness.permutation(len(self.sizes), self.seed, randomness.BLOCKS, self.source, epoch)
        ends = np.concatenate([[0], np.cumsum(self.sizes[order])])
        return order, np.append(ends[: -1 : self.groups], ends[-1])

    def _run(self, epoch: int, run: int) -> np.ndarray:
        """Rows of one run of W row groups in their order, int64 [rows of the run]."""
        order, _ = self._epochs(epoch)
        blocks = order[run * self.groups : (run + 1) * self.groups]
        rows = np.concatenate([np.arange(self.starts[b], self.starts[b + 1]) for b in blocks])
        return rows[randomness.permutation(len(rows), self.seed, randomness.ROWS, self.source, epoch, run)]

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, row), each int64 [N], at running positions int64 [N]."""
        epochs, within = np.divmod(positions, self.rows)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            _, starts = self._epochs(epoch)
            mine = np.flatnonzero(epochs == epoch)
            runs = np.searchsorted(starts, within[mine], side="right") - 1
            for run in np.unique(runs).tolist():
                inside = mine[runs == run]
                order = self._runs(epoch, run)
                rows[inside] = order[within[inside] - starts[run]]
        return epochs, rows


class Order:
    """All three sources of order together: slots to places.

    Args:
        group_sizes: rows of each row group, for every source.
        weights: shares of the sources, relative to each other.
        window: slots M of a mixing window.
        groups: row groups W whose rows are shuffled together.

    Raises:
        ValueError: a source without rows, or with a weight too small for the window.
    """

    def __init__(
        self, group_sizes: Sequence[Sequence[int]], weights: Sequence[float], *, seed: int, window: int, groups: int
    ) -> None:
        for source, sizes in enumerate(group_sizes):
            if sum(sizes) == 0:
                raise ValueError(f"sources.{source} has no rows; leave it out")
        self.seed, self.window = seed, window
        self.counts = window_counts(weights, window)
        self.sources = [
            SourceOrder(sizes, seed=seed, source=source, groups=groups) for source, sizes in enumerate(group_sizes)
        ]
        self._windows = _Kept(self._window, 4)

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many places of that source came before in the window), each int64 [M]."""
        laid = np.repeat(np.arange(len(self.counts)), self.counts)
        source = laid[randomness.permutation(self.window, self.seed, randomness.MIXING, window)]
        ordinal = np.empty(self.window, dtype=np.int64)
        for number, count in enumerate(self.counts):
            ordinal[source == number] = np.arange(count)
        return source, ordinal

    def __call__(self, slots: np.ndarray) -> Places:
        """Places of slots int64 [N]."""
        windows, within = np.divmod(slots, self.window)
        source, position = np.empty_like(slots), np.empty_like(slots)
        for window in np.unique(windows).tolist():
            mine = np.flatnonzero(windows == window)
            in_window, ordinal = self._windows(window)
            source[mine] = in_window[within[mine]]
            position[mine] = window * self.counts[source[mine]] + ordinal[within[mine]]
        epoch, row = np.empty_like(slots), np.empty_like(slots)
        for number in np.unique(source).tolist():
            mine = np.flatnonzero(source == number)
            epoch[mine], row[mine] = self.sources[number](position[mine])
        return Places(source, epoch, row)
