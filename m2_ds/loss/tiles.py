"""Loss and gradients of logits S = R C^T that are never held whole: one pass over their tiles, or two.

Rows R [n, E] are unit vectors times exp(logit_scale), columns C [B, E] unit vectors; P = dL/dS up to a factor of the
caller's. ``both``: R and C are one process's whole batch, so the columns' sums and gradients come from the same tiles
(four matrix products in all); otherwise they belong to other ranks and only the rows' are made.

In softmax form a running log-sum-exp makes any scale safe: one shift for a whole tile would underflow fp32 where
logits of its rows lie 87 apart. On a CPU, where an exponential costs as much as several additions, one shift is tried
and looked at; a GPU would have to wait for the look.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from m2_ds.loss.answers import TILE_COLUMNS, TILE_ROWS, Answers, Tile

_LOWEST = -1e30  # stands for -inf where a difference of two of them would be NaN


class Logits:
    """Tiles of S, computed into one buffer after another; a second one is scratch."""

    def __init__(self, rows: Tensor, columns: Tensor, answers: Answers, both: bool) -> None:
        self.rows, self.columns, self.answers, self.both = rows, columns, answers, both
        self.tiles = answers.tiles()
        size = min(TILE_ROWS, len(rows)) * min(TILE_COLUMNS, len(columns))
        self._buffers = rows.new_empty(2, size)

    def fill(self, tile: Tile) -> Tensor:
        """The tile's logits, as they are."""
        return torch.mm(self.rows[tile.rows], self.columns_of(tile).T, out=self._view(0, tile))

    def scratch(self, tile: Tile) -> Tensor:
        return self._view(1, tile)

    def columns_of(self, tile: Tile) -> Tensor:
        return self.columns[tile.columns].to(self.rows.dtype)

    def put(self, tile: Tile, s: Tensor, value: float) -> None:
        """Write ``value`` to what does not count: excluded places and padded columns (and rows, for the columns)."""
        if len(tile.excluded):
            s.view(-1).index_fill_(0, tile.excluded.flat, value)
        if self.answers.padding is not None:
            self._put_lines(s, tile.columns, 1, value)
            if self.both:
                self._put_lines(s, tile.rows, 0, value)

    def _put_lines(self, s: Tensor, span: slice, dim: int, value: float) -> None:
        padding = self.answers.padding
        assert padding is not None
        inside = padding[(padding >= span.start) & (padding < span.stop)] - span.start
        s.index_fill_(dim, inside, value)

    def _view(self, buffer: int, tile: Tile) -> Tensor:
        height, width = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        return self._buffers[buffer, : height * width].view(height, width)


def _may_look(x: Tensor) -> bool:
    """Whether the host can read a number without waiting for a device."""
    return x.device.type == "cpu"


@dataclass
class Sums:
    """Of one direction: log-sum-exp and loss of every row (or column)."""

    lse: Tensor
    loss: Tensor


def softmax_sums(logits: Logits, smoothing: float) -> tuple[Sums, Sums | None]:
    """Cross entropy of rows, and of columns with ``both``; the first pass."""
    answers, rows = logits.answers, logits.rows
    n, b = len(rows), len(logits.columns)
    row_lse, row_target = rows.new_full((n,), -torch.inf), rows.new_zeros(n)
    column_lse, column_target = rows.new_full((b,), -torch.inf), rows.new_zeros(b)
    for tile in logits.tiles:
        s = logits.fill(tile)
        _add_targets(logits, s, tile, row_target, column_target, smoothing)
        logits.put(tile, s, -torch.inf)
        if logits.both and _add_both_lse(row_lse[tile.rows], column_lse[tile.columns], s, logits.scratch(tile)):
            continue
        _add_lse(row_lse[tile.rows], s, 1, logits.scratch(tile))
        if logits.both:
            _add_lse(column_lse[tile.columns], s, 0, logits.scratch(tile))
    for lse in (row_lse, column_lse):
        lse.clamp_(min=_LOWEST)  # of lines that are all padding
    row = Sums(row_lse, row_lse - row_target)
    column = Sums(column_lse, column_lse - column_target) if logits.both else None
    for sums in (row, column):
        if sums is not None and answers.valid is not None:
            sums.loss.mul_(answers.valid)
    return row, column


def _add_lse(total: Tensor, s: Tensor, dim: int, scratch: Tensor) -> None:
    largest = s.amax(dim, keepdim=True).clamp_(min=_LOWEST)
    sums = torch.sub(s, largest, out=scratch).exp_().sum(dim)
    torch.logaddexp(total, sums.log_().add_(largest.squeeze(dim)), out=total)


def _add_both_lse(rows: Tensor, columns: Tensor, s: Tensor, scratch: Tensor) -> bool:
    """Both directions from one exponential; False, with nothing added, where a line's sum is too small to trust."""
    if not _may_look(s):
        return False
    shift = s.max()
    e = torch.sub(s, shift, out=scratch).exp_()
    sums = e.sum(1), e.sum(0)
    # What underflows is below `tiny` each: 1e-10 of such a sum at most.
    if not min(float(x.min()) for x in sums) > 1e14 * torch.finfo(s.dtype).tiny:
        return False
    for total, part in zip((rows, columns), sums):
        torch.logaddexp(total, part.log_().add_(shift), out=total)
    return True


def _add_targets(logits: Logits, s: Tensor, tile: Tile, row: Tensor, column: Tensor, smoothing: float) -> None:
    """Add sum_j Y_ij S_ij of this tile to ``row`` and its mirror to ``column``; smoothing zeroes what doesn't count."""
    answers, both = logits.answers, logits.both
    right = s.view(-1)[tile.right.flat] * tile.right.weight * (1 - smoothing)
    row[tile.rows].index_add_(0, tile.right.row, right)
    if both:
        column[tile.columns].index_add_(0, tile.right.column, right)
    if smoothing:
        logits.put(tile, s, 0.0)
        row[tile.rows] += s.sum(1) * (smoothing / answers.allowed_row[tile.rows])
        if both:
            column[tile.columns] += s.sum(0) * (smoothing / answers.allowed_column[tile.columns])


def softmax_gradients(
    logits: Logits, row_lse: Tensor, column_lse: Tensor, smoothing: float
) -> tuple[Tensor, Tensor | None]:
    """P C [n, E] and, with ``both``, P^T R [B, E], for P = exp(S - row_lse) + exp(S - column_lse) - Y - Y^T.

    The second pass; ``row_lse`` [n], ``column_lse`` [B].
    """
    answers = logits.answers
    d_rows, d_columns = _empty_gradients(logits)
    lowest = _common_shift(row_lse, column_lse)
    if lowest is not None:
        row_factor, column_factor = ((lowest - x).exp() for x in (row_lse, column_lse))
    for tile in logits.tiles:
        s = logits.fill(tile)
        logits.put(tile, s, -torch.inf)
        if lowest is not None:
            both = torch.add(row_factor[tile.rows, None], column_factor[tile.columns], out=logits.scratch(tile))
            p = s.sub_(lowest).exp_().mul_(both)
        else:
            p = torch.sub(s, row_lse[tile.rows, None], out=logits.scratch(tile)).exp_()
            p += s.sub_(column_lse[tile.columns]).exp_()
        if smoothing:
            p -= smoothing / answers.allowed_row[tile.rows, None]
            p -= smoothing / answers.allowed_column[tile.columns]
            logits.put(tile, p, 0.0)
        p.view(-1).index_add_(0, tile.right.flat, tile.right.weight, alpha=-2 * (1 - smoothing))
        _add_products(logits, tile, p, d_rows, d_columns)
    return d_rows, d_columns


def _common_shift(row_lse: Tensor, column_lse: Tensor) -> Tensor | None:
    """The smallest log-sum-exp, where the largest is near enough for exponentials of fp32 to hold the difference.

    Then exp(S - row) + exp(S - column) = exp(S - shift) (exp(shift - row) + exp(shift - column)).
    """
    if not _may_look(row_lse):
        return None
    lowest = torch.minimum(row_lse.min(), column_lse.min())
    highest = torch.maximum(row_lse.max(), column_lse.max())
    return lowest if float(highest - lowest) < 60 else None


@dataclass
class SigmoidPass:
    """Losses of rows (and columns), P C and P^T R as above, and the sum of P, for P = sigmoid(S + bias) - Y."""

    row_loss: Tensor
    column_loss: Tensor
    d_rows: Tensor
    d_columns: Tensor | None
    d_bias: Tensor


def sigmoid_pass(logits: Logits, bias: Tensor) -> SigmoidPass:
    """Every place a question of its own: -log sigmoid(S + bias) where right, -log sigmoid(-S - bias) elsewhere.

    (SigLIP, arXiv 2303.15343.)
    """
    rows = logits.rows
    d_rows, d_columns = _empty_gradients(logits)
    row_loss, column_loss = rows.new_zeros(len(rows)), rows.new_zeros(len(logits.columns))
    d_bias = rows.new_zeros(())
    for tile in logits.tiles:
        s = logits.fill(tile).add_(bias)
        right = tile.right
        at_right = s.view(-1)[right.flat]
        logits.put(tile, s, -torch.inf)
        losses = F.softplus(s)
        row_loss[tile.rows] += losses.sum(1).index_add_(0, right.row, at_right, alpha=-1)
        if logits.both:
            column_loss[tile.columns] += losses.sum(0).index_add_(0, right.column, at_right, alpha=-1)
        p = s.sigmoid_()
        p.view(-1).index_add_(0, right.flat, torch.ones_like(right.weight), alpha=-1)
        if logits.answers.valid is not None:
            p.mul_(logits.answers.valid[tile.rows, None])
        d_bias += p.sum()
        _add_products(logits, tile, p, d_rows, d_columns)
    if logits.answers.valid is not None:
        row_loss.mul_(logits.answers.valid)
    return SigmoidPass(row_loss, column_loss, d_rows, d_columns, d_bias)


def _empty_gradients(logits: Logits) -> tuple[Tensor, Tensor | None]:
    rows, columns = logits.rows, logits.columns
    return torch.zeros_like(rows), torch.zeros_like(columns, dtype=rows.dtype) if logits.both else None


def _add_products(logits: Logits, tile: Tile, p: Tensor, d_rows: Tensor, d_columns: Tensor | None) -> None:
    d_rows[tile.rows].addmm_(p, logits.columns_of(tile))
    if d_columns is not None:
        d_columns[tile.columns].addmm_(p.T, logits.rows[tile.rows])
