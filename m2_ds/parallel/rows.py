"""The cross entropy of rows over a large vocabulary, without the scores of all rows at once.

Scores of a part of the rows exist at a time, forward and backward, and become what is wanted in place: probabilities
are made once again in backward from the scores' normaliser, as attention does (arXiv 2205.14135).
Legend: R rows, r of them at a time, D width, V vocabulary (or a rank's share of it).
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

# Few rows at a time keep scores in a cache; each part adds to the whole gradient of the weight, which costs more with
# a large vocabulary (benchmarks/masked.py).
SCORES, LEAST_ROWS = 2**22, 128


class Shares(Protocol):
    """How a vocabulary lies on ranks: this one scores the ``length`` tokens from number ``start`` on."""

    start: int
    length: int

    def whole(self, statistics: Tensor) -> Tensor:
        """This rank's -> all tokens': [3, R], log of the sum of exp(score), best score, score of the wanted one."""

    def summed(self, gradient: Tensor) -> Tensor:
        """The sum over ranks of [R, D], which is given up."""


class Undivided:
    """All V tokens are scored here."""

    start = 0

    def __init__(self, length: int) -> None:
        self.length = length

    def whole(self, statistics: Tensor) -> Tensor:
        return statistics

    def summed(self, gradient: Tensor) -> Tensor:
        return gradient


def told(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
    """Cross entropy [R] in fp32 of x [R, D] with ids [R], and whether the likeliest token is the right one, bool [R].

    Scores are x weight^T + bias; ``weight`` [V, D] may have more rows than ``shares.length``, which score nothing.
    """
    losses, right = _Told.apply(x, weight, bias, targets, shares)
    return losses, right


class _Told(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, shares: Shares
    ) -> tuple[Tensor, Tensor]:
        own, here = _own(targets, shares)
        statistics = torch.empty(3, len(x), device=x.device)
        for rows, scores in _scores(x, weight, bias, shares):
            wanted = scores.gather(1, own[rows, None])[:, 0].masked_fill(~here[rows], -torch.inf)
            best = scores.amax(1)
            total = scores.sub_(best.clamp(min=torch.finfo(best.dtype).min)[:, None]).exp_().sum(1)
            statistics[:, rows] = torch.stack([best + total.log(), best, wanted])
        normaliser, best, wanted = shares.whole(statistics)
        ctx.save_for_backward(x, weight, bias, targets, normaliser)
        ctx.shares = shares
        right = wanted >= best
        ctx.mark_non_differentiable(right)
        return normaliser - wanted, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, normaliser = ctx.saved_tensors
        shares, of_losses = ctx.shares, gradients[0]
        own, here = _own(targets, shares)
        of_x, of_weight, of_bias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
        for rows, scores in _scores(x, weight, bias, shares):
            scale = of_losses[rows, None]
            scores.sub_(normaliser[rows, None]).exp_().mul_(scale)
            scores.scatter_add_(1, own[rows, None], -scale * here[rows, None])
            of_bias += scores.sum(0)
            scores = scores.to(x.dtype)
            torch.mm(scores, weight, out=of_x[rows])
            of_weight.addmm_(scores.t(), x[rows])
        return shares.summed(of_x), of_weight, of_bias, None, None


def _own(targets: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
    """A wanted token's number on this rank (0 where it has it not), and whether it has it."""
    own = targets - shares.start
    here = (own >= 0) & (own < shares.length)
    return own.masked_fill(~here, 0), here


def _scores(x: Tensor, weight: Tensor, bias: Tensor, shares: Shares) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the rows, and their scores [r, V] in fp32."""
    count = max(LEAST_ROWS, SCORES // len(weight))
    for start in range(0, len(x), count):
        rows = slice(start, min(len(x), start + count))
        scores = F.linear(x[rows], weight, bias).float()
        scores[:, shares.length :] = -torch.inf
        yield rows, scores
