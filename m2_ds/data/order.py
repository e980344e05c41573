"""Which pair stands at which place of the stream: a pure function of (seed, slot), the same for any number of ranks.

Slots count the pairs of a run from 0. Three stages:

1. Mixing. In every window of M slots each source has the same number of places, by largest remainder of its weight, and
   each language its share of them (`window_cells`); a permutation of the window says where they lie. So a source's
   running position is known without counting.
2. Shuffling. A source is read in epochs. An epoch permutes the row groups and then the rows inside every run of W
   permuted row groups: each row comes once an epoch, and only W row groups are in use at a time.
3. Everything else about a pair (caption, augmentation) is hashed from (seed, slot) by its user.

Shapes: N slots asked for at once; M slots of a mixing window; G row groups of a source.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from m2_ds.data import randomness

T = TypeVar("T")


class Places(NamedTuple):
    """Where pairs come from, each int64 [N]: source, epoch, row; language: number of the one that is wanted."""

    source: np.ndarray
    epoch: np.ndarray
    row: np.ndarray
    language: np.ndarray


class Blocks(Protocol):
    """The row groups of a source (m2_ds.data.index)."""

    @property
    def rows(self) -> int: ...
    @property
    def row_groups(self) -> int: ...
    def starts(self, groups: np.ndarray) -> np.ndarray:
        """First rows: int64 [N] -> int64 [N]."""

    def sizes(self, groups: np.ndarray | None = None) -> np.ndarray:
        """Rows: int64 [N] -> int64 [N]; None: of all row groups."""


class BlockSizes:
    """`Blocks` from a list of their rows."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(sizes, dtype=np.int64))]).astype(np.int64)
        self.rows, self.row_groups = int(self._starts[-1]), len(sizes)

    def starts(self, groups: np.ndarray) -> np.ndarray:
        return self._starts[groups]

    def sizes(self, groups: np.ndarray | None = None) -> np.ndarray:
        sizes = np.diff(self._starts)
        return sizes if groups is None else sizes[groups]


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


def window_cells(
    counts: np.ndarray, languages: Sequence[Mapping[int, float]], names: Sequence[str] = ()
) -> list[list[tuple[int, int]]]:
    """(language, places) of each source in a mixing window; a source's add up to its ``counts``.

    Every number is its exact value rounded down or up. What earlier sources have too little of a language by rounding,
    later ones are first to make up for: over all sources, two languages are within one place of their exact numbers.

    Args:
        counts: places of each source, as `window_counts` gives them.
        languages: of each source, the languages' numbers and shares.
        names: of the languages, for messages.

    Raises:
        ValueError: a language whose share is too small to have a place.
    """
    short: dict[int, float] = {}
    cells = []
    for source, (count, shares) in enumerate(zip(counts.tolist(), languages)):
        total = sum(shares.values())
        exact = {language: count * share / total for language, share in shares.items()}
        places = {language: int(value + 1e-9) for language, value in exact.items()}
        rest = count - sum(places.values())
        wanted = {language: exact[language] - places[language] + short.get(language, 0.0) for language in shares}
        # Only what is not whole may be rounded up.
        open_ones = [language for language in shares if exact[language] - places[language] > 1e-9]
        for language in sorted(open_ones, key=lambda language: -wanted[language])[:rest]:
            places[language] += 1
        for language, value in exact.items():
            short[language] = short.get(language, 0.0) + value - places[language]
            if places[language] == 0:
                enough, name = int(np.ceil(counts.sum() / value)), names[language] if names else language
                raise ValueError(
                    f"sources.{source}: the share of language {name} gives it no place among the source's {count} of "
                    f"{counts.sum()} pairs; leave it out of the source's languages or make mixing_window larger "
                    f"({enough} is enough)"
                )
        cells.append(list(places.items()))
    return cells


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
        blocks: its row groups, or the rows of each.
        source: number of the source in the mixture; sources of equal shape are shuffled differently.
        groups: row groups W whose rows are shuffled together.
    """

    def __init__(self, blocks: Blocks | Sequence[int], *, seed: int, source: int, groups: int) -> None:
        self.blocks: Blocks = blocks if hasattr(blocks, "starts") else BlockSizes(blocks)  # type: ignore[arg-type, assignment]
        self.rows = self.blocks.rows
        self.seed, self.source, self.groups = seed, source, groups
        self._epochs = _Kept(self._epoch, 2)
        self._runs = _Kept(self._run, 4)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(row groups in their order, int32 or int64 [G]; first position of every run of W groups and the end)."""
        order = randomness.permutation(self.blocks.row_groups, self.seed, randomness.BLOCKS, self.source, epoch)
        ends = np.cumsum(self.blocks.sizes()[order])
        runs = np.append(np.concatenate([[0], ends])[: -1 : self.groups], ends[-1])
        return order.astype(np.int32 if len(order) < 2**31 else np.int64), runs

    def _blocks_of(self, epoch: int, run: int) -> np.ndarray:
        order, _ = self._epochs(epoch)
        return order[run * self.groups : (run + 1) * self.groups].astype(np.int64)

    def _run(self, epoch: int, run: int) -> np.ndarray:
        """Rows of one run of W row groups in their order, int64 [rows of the run]."""
        blocks = self._blocks_of(epoch, run)
        pairs = zip(self.blocks.starts(blocks).tolist(), self.blocks.sizes(blocks).tolist())
        rows = np.concatenate([np.arange(start, start + size) for start, size in pairs])
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

    def run_at(self, position: int) -> tuple[int, int]:
        """(epoch, run) that a running position lies in."""
        epoch, within = divmod(position, self.rows)
        return epoch, int(np.searchsorted(self._epochs(epoch)[1], within, side="right")) - 1

    def groups_from(self, epoch: int, run: int) -> list[int]:
        """The row groups of a run and of the one after it, in that order."""
        last = run + 2 == len(self._epochs(epoch)[1])
        after = self._blocks_of(epoch + 1, 0) if last else self._blocks_of(epoch, run + 1)
        return [*self._blocks_of(epoch, run).tolist(), *after.tolist()]


class Order:
    """All three stages together: slots to places.

    Args:
        sources: of every source its row groups, or the rows of each.
        weights: shares of the sources, relative to each other.
        window: slots M of a mixing window.
        groups: row groups W whose rows are shuffled together.
        languages: of every source the shares of languages, by their numbers; None: there is one.
        names: of the languages, for messages.

    Raises:
        ValueError: a source without rows, or with a weight too small for the window.
    """

    def __init__(
        self,
        sources: Sequence[Blocks | Sequence[int]],
        weights: Sequence[float],
        *,
        seed: int,
        window: int,
        groups: int,
        languages: Sequence[Mapping[int, float]] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.seed, self.window = seed, window
        self.sources = [
            SourceOrder(blocks, seed=seed, source=source, groups=groups) for source, blocks in enumerate(sources)
        ]
        for number, source in enumerate(self.sources):
            if source.rows == 0:
                raise ValueError(f"sources.{number} has no rows; leave it out")
        self.counts = window_counts(weights, window)
        self.cells = window_cells(self.counts, languages or [{0: 1.0}] * len(self.counts), names)
        self._windows = _Kept(self._window, 4)

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, how many places of that source came before in the window, language), each int64 [M]."""
        order = randomness.permutation(self.window, self.seed, randomness.MIXING, window)
        source = np.repeat(np.arange(len(self.counts)), self.counts)[order]
        flat = [cell for cells in self.cells for cell in cells]
        language = np.repeat([number for number, _ in flat], [places for _, places in flat])[order]
        ordinal = np.empty(self.window, dtype=np.int64)
        for number, count in enumerate(self.counts):
            ordinal[source == number] = np.arange(count)
        return source, ordinal, language

    def positions(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, its running position, language), each int64 [N], of slots int64 [N]."""
        windows, within = np.divmod(slots, self.window)
        source, position, language = (np.empty_like(slots) for _ in range(3))
        for window in np.unique(windows).tolist():
            mine = np.flatnonzero(windows == window)
            in_window, ordinal, wanted = self._windows(window)
            source[mine], language[mine] = in_window[within[mine]], wanted[within[mine]]
            position[mine] = window * self.counts[source[mine]] + ordinal[within[mine]]
        return source, position, language

    def __call__(self, slots: np.ndarray) -> Places:
        """Places of slots int64 [N]."""
        source, position, language = self.positions(slots)
        epoch, row = np.empty_like(slots), np.empty_like(slots)
        for number in np.unique(source).tolist():
            mine = np.flatnonzero(source == number)
            epoch[mine], row[mine] = self.sources[number](position[mine])
        return Places(source, epoch, row, language)

    def seen(self, slots: int) -> list[int]:
        """How many pairs of each source the first ``slots`` slots hold."""
        windows, rest = divmod(slots, self.window)
        found = windows * self.counts
        if rest:
            found = found + np.bincount(self._windows(windows)[0][:rest], minlength=len(self.counts))
        return [int(count) for count in found]
