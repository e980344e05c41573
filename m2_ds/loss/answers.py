"""Which columns of the logits are right for which rows, and which do not count: index lists, tile by tile.

Repeats are few among many pairs, so they are kept as lists of places: no matrix of right answers is ever made. All of
it is whole-number work on the host. Legend: n own pairs (rows), B pairs of the contrast group (columns).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m2_ds.loss.config import Repeats

PADDING = -1  # the id of a row that only fills a batch up
TILE_ROWS, TILE_COLUMNS = 1024, 2048  # 8 MiB of logits in fp32: stays in a CPU's last cache


@dataclass(frozen=True)
class Marks:
    """Places of a tile: ``row`` and ``column`` in it, ``flat`` in its row-major storage, the target's ``weight``."""

    row: Tensor
    column: Tensor
    flat: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.flat)


@dataclass(frozen=True)
class Tile:
    """A rectangle of the logits with its right places and those that don't count (beside padded columns)."""

    rows: slice
    columns: slice
    right: Marks
    excluded: Marks


class Answers:
    """Right and excluded places of own rows against all columns.

    ``own`` int64 [n] and ``everyone`` int64 [B] are ids, equal for pairs of one group, PADDING for rows that are none;
    ``place`` int64 [n] says which column is a row's own pair. All on the host.
    """

    def __init__(
        self, own: Tensor, everyone: Tensor, place: Tensor, repeats: Repeats, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = device, dtype
        self.rows, self.columns = len(own), len(everyone)
        padding = everyone == PADDING
        self.pairs = self.columns - int(padding.sum())
        if self.pairs == 0:
            raise ValueError("a contrastive batch without a single pair: every row of every rank is padding")
        self.padding = self._sent(padding.nonzero()[:, 0]) if self.pairs < self.columns else None
        self.valid = self._sent((own != PADDING).to(dtype)) if self.padding is not None else None

        row = (own != PADDING).nonzero()[:, 0]
        first, count, order = _ranges(own[row], everyone)
        self.repeated = int((count - 1).sum())
        none, one = torch.zeros(0, dtype=torch.int64), torch.ones(len(row), dtype=dtype)
        if repeats == "negative":
            self._right = self._by_tile(row, place[row], one)
            self._excluded = self._by_tile(none, none, one[:0])
        else:
            # Every place whose row and column are of one group, row by row.
            of = torch.repeat_interleave(torch.arange(len(row)), count)
            column = order[first[of] + torch.arange(len(of)) - (count.cumsum(0) - count)[of]]
            if repeats == "positive":
                self._right = self._by_tile(row[of], column, 1.0 / count[of].to(dtype))
                self._excluded = self._by_tile(none, none, one[:0])
            else:
                others = column != place[row[of]]
                self._right = self._by_tile(row, place[row], one)
                self._excluded = self._by_tile(row[of][others], column[others], torch.ones(int(others.sum())))
        # Columns that count for a row, and rows that count for a column: over them label smoothing spreads its share.
        leave_out = repeats == "exclude"
        self.allowed_row = self._sent((self.pairs - leave_out * _others(own, everyone)).to(dtype))
        self.allowed_column = self._sent((self.pairs - leave_out * _others(everyone, everyone)).to(dtype))

    def tiles(self) -> list[Tile]:
        """All rectangles, row by row."""
        return [
            Tile(
                slice(top, min(top + TILE_ROWS, self.rows)),
                slice(left, min(left + TILE_COLUMNS, self.columns)),
                right,
                excluded,
            )
            for (top, left), right, excluded in zip(self._corners(), self._right, self._excluded)
        ]

    def _sent(self, x: Tensor) -> Tensor:
        """On the device, without waiting for what it is at work on (which copies from pageable memory would)."""
        return x if self.device.type == "cpu" else x.pin_memory().to(self.device, non_blocking=True)

    def _corners(self) -> list[tuple[int, int]]:
        return [(t, c) for t in range(0, self.rows, TILE_ROWS) for c in range(0, self.columns, TILE_COLUMNS)]

    def _by_tile(self, row: Tensor, column: Tensor, weight: Tensor) -> list[Marks]:
        """Places of the whole, sorted into tiles."""
        across = -(-self.columns // TILE_COLUMNS)
        number = (row // TILE_ROWS) * across + column // TILE_COLUMNS
        order = number.argsort(stable=True)
        row, column, number, weight = row[order], column[order], number[order], weight[order]
        left = column // TILE_COLUMNS * TILE_COLUMNS
        width = (self.columns - left).clamp(max=TILE_COLUMNS)
        row, column = row % TILE_ROWS, column - left
        bounds = torch.searchsorted(number, torch.arange(len(self._corners()) + 1)).tolist()
        row, column, flat = (self._sent(x) for x in (row, column, row * width + column))
        weight = self._sent(weight.to(self.dtype))
        return [Marks(row[a:b], column[a:b], flat[a:b], weight[a:b]) for a, b in zip(bounds, bounds[1:])]


def _ranges(ids: Tensor, everyone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the columns of each id lie: ``order[first : first + count]``."""
    order = everyone.argsort(stable=True)
    ordered = everyone[order]
    first = torch.searchsorted(ordered, ids)
    return first, torch.searchsorted(ordered, ids, right=True) - first, order


def _others(ids: Tensor, everyone: Tensor) -> Tensor:
    """How many columns beside its own are of each id's group."""
    _, count, _ = _ranges(ids, everyone)
    return count - 1
