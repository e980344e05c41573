"""Pictures that look alike: 64-bit hashes within a Hamming distance, found through equal bands, and colours to confirm.

If two hashes differ in at most d bits, at least one of d + 1 bands that cut the 64 bits is equal in both (pigeonhole),
so comparing within equal bands finds all such pairs. Legend: N pictures, with C bytes of mean colours each.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

Array = np.ndarray


def bands(hashes: Array, distance: int) -> Array:
    """uint64 [distance + 1, N] from uint64 [N]: the bits of each band, its number in the lowest 8 bits."""
    edges = np.linspace(0, 64, distance + 2).astype(int)
    found = []
    for number, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
        width = int(high - low)
        bits = (hashes >> np.uint64(low)) & np.uint64((1 << width) - 1)
        # A whole hash as one band leaves no bits for a number, and needs none.
        found.append(bits if width > 56 else (bits << np.uint64(8)) | np.uint64(number))
    return np.stack(found)


class Signed(NamedTuple):
    """Signatures of pictures: hashes uint64 [N], colours uint8 [N, C]."""

    hashes: Array
    colours: Array


def alike(one: Signed, i: Array, other: Signed, j: Array, distance: int, colour: int) -> Array:
    """bool [pairs]: which pairs (one[i], other[j]) are within both bounds."""
    near = np.bitwise_count(one.hashes[i] ^ other.hashes[j]) <= distance
    at = np.flatnonzero(near)
    difference = np.abs(one.colours[i[at]].astype(np.int16) - other.colours[j[at]])
    near[at] = difference.max(axis=1, initial=0) <= colour
    return near


def within_runs(runs: Array) -> Iterator[tuple[Array, Array]]:
    """Pairs (i, j), i < j, of rows in one run; `runs` [N] is sorted. A step a distance j - i, so memory stays at N."""
    ends = np.searchsorted(runs, runs, side="right")
    rows = np.arange(len(runs))
    offset = 1
    while len(rows := rows[ends[rows] > rows + offset]):
        yield rows, rows + offset
        offset += 1


def earlier_twins(run: Array, hashes: Array, colours: Array, order: Array, distance: int, colour: int) -> Array:
    """int64 [N]: for each row the row of least `order` among those before it that look alike in its run, or -1.

    Args:
        run: uint64 [N], equal for rows that are to be compared.
        hashes, colours: uint64 [N] and uint8 [N, C].
        order: int64 [N], distinct; a row is compared with those of less.
    """
    count, signed = len(run), Signed(hashes, colours)
    twins = np.full(count, -1, dtype=np.int64)
    sort = np.lexsort((order, hashes, run))
    # Equal signatures first: of a thousand equal pictures in a run only the first is compared with others.
    same = _blocks(run[sort], hashes[sort], colours[sort])
    first = sort[same]
    repeats = first != sort
    twins[sort[repeats]] = first[repeats]
    rows = sort[~repeats]
    rows = rows[np.lexsort((order[rows], run[rows]))]
    best = np.full(count, np.iinfo(np.int64).max)
    for i, j in within_runs(run[rows]):
        a, b = rows[i], rows[j]
        near = alike(signed, a, signed, b, distance, colour)
        a, b = a[near], b[near]
        closer = order[a] < best[b]
        best[b[closer]], twins[b[closer]] = order[a[closer]], a[closer]
    # A repeat points at the first of its equals; where that one has an earlier twin itself, it is the repeat's, too.
    there = np.flatnonzero(twins >= 0)
    there = there[best[there] == np.iinfo(np.int64).max]
    onward = twins[twins[there]]
    twins[there[onward >= 0]] = onward[onward >= 0]
    return twins


def _blocks(run: Array, hashes: Array, colours: Array) -> Array:
    """int64 [N]: place of the first row that equals each row; equal rows of (run, hashes) stand together."""
    block = np.flatnonzero(np.r_[True, (run[1:] != run[:-1]) | (hashes[1:] != hashes[:-1])])
    found = np.arange(len(run))
    ends = np.r_[block[1:], len(run)]
    for low, high in zip(block[ends - block > 1], ends[ends - block > 1]):
        seen: dict[bytes, int] = {}
        for place in range(low, high):
            found[place] = seen.setdefault(colours[place].tobytes(), place)
    return found


class Index:
    """A fixed set of pictures to look others up in: exact bytes, and likeness."""

    def __init__(self, digests: Array, hashes: Array, colours: Array, distance: int | None, colour: int) -> None:
        self.digests = {bytes(digest) for digest in digests}
        self.signed, self.distance, self.colour = Signed(hashes, colours), distance, colour
        self.sorted: list[tuple[Array, Array]] = []
        if distance is not None and len(hashes):
            for band in bands(hashes, distance):
                order = np.argsort(band, kind="stable")
                self.sorted.append((band[order], order))

    def near(self, hashes: Array, colours: Array) -> Array:
        """int64 [N]: the first picture of the index that each of uint64 [N], uint8 [N, C] looks like, or -1."""
        found = np.full(len(hashes), -1, dtype=np.int64)
        if not self.sorted or self.distance is None:
            return found
        for (values, order), band in zip(self.sorted, bands(hashes, self.distance)):
            low, high = np.searchsorted(values, band, "left"), np.searchsorted(values, band, "right")
            lengths = high - low
            i = np.repeat(np.arange(len(hashes)), lengths)
            inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            j = order[np.repeat(low, lengths) + inside]
            near = alike(Signed(hashes, colours), i, self.signed, j, self.distance, self.colour)
            for a, b in zip(i[near], j[near]):
                found[a] = b if found[a] < 0 else min(found[a], b)
        return found
