"""The contrastive loss (ITC) and its gradients in closed form, from one all-gather of features and one of log-sum-exps.

Legend: g ranks of the group, n own pairs, B pairs of the contrast group, C captions a picture, N levels, E embedding.

With S = s I T^T over the B pairs (s = exp(logit_scale), rows unit vectors) and Y the right answers (rows sum to 1):

    L = 1 / (2 B) [ sum_i (lse_j S_ij - sum_j Y_ij S_ij) + sum_j (lse_i S_ij - sum_i Y_ji S_ij) ]
    dL/dS_ij = 1 / (2 B) [ exp(S_ij - row_i) + exp(S_ij - col_j) - Y_ij - Y_ji ]

A rank computes the rows of its own pictures and of its own captions, so it needs all features and all log-sum-exps but
no gradient of anyone else: no communication in backward. dL/dlogit_scale = sum_ij dL/dS_ij S_ij = sum_i I_i . dL/dI_i
needs no pass of its own. (CLIP, arXiv 2103.00020, with both gathers made exact; docs/grouped_aggregation.md.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2_ds.loss.answers import Answers
from m2_ds.loss.config import LossConfig
from m2_ds.loss.exchange import Exchange, Pool
from m2_ds.loss.tiles import Logits, Sums, sigmoid_pass, softmax_gradients, softmax_sums
from m2_ds.parallel.mesh import Group


@dataclass(frozen=True)
class Level:
    """What a level's logits are made with, beside features: ``logit_scale`` [1], its weight, ``logit_bias`` [1]."""

    logit_scale: Tensor
    weight: float = 1.0
    logit_bias: Tensor | None = None


@dataclass(frozen=True)
class LevelGradient:
    """``features``: the gradients of image [n, E] and of each caption [n, E]; ``logit_scale`` and ``logit_bias`` [1].

    A rank's own share: over the group's ranks, features' gradients lie side by side, those of scale and bias add up.
    """

    features: list[Tensor]
    logit_scale: Tensor
    logit_bias: Tensor | None


@dataclass(frozen=True)
class ContrastiveLoss:
    """``by_pair`` [N, C, n]: loss of each own pair, 0 for padding; ``gradients`` of the group's loss, by level.

    The group's loss is the mean of ``by_pair`` over captions and all ranks' pairs, weighted over levels; ``value`` the
    same mean over own pairs only. ``pairs``: B without padding, ``own_pairs`` of them own; ``repeated``: own pairs'
    group members beside themselves, which ``repeats`` makes right answers, leaves out or counts as wrong (a tensor
    where it was summed over ranks).
    """

    by_pair: Tensor
    value: Tensor
    gradients: list[LevelGradient]
    pairs: int
    own_pairs: int
    repeated: int | Tensor


def contrastive_loss(levels: Sequence[Level], pool: Pool, config: LossConfig) -> ContrastiveLoss:
    """Weighted sum over levels of the mean over captions of ITC over the group's pairs.

    ``pool``: the exchanged features, N (1 + C) matrices: by level, the pictures and then each set of captions.
    Arithmetic is in fp32, or in fp64 where features come in it. Extra memory: the gathered features, their gradients
    and two tiles; no matrix of n x B.
    """
    captions = len(pool.own) // len(levels) - 1
    own = pool.own[0]
    answers = Answers(pool.own_ids, pool.ids, pool.place, config.repeats, own.device, own.dtype)
    kernel = _sigmoid if config.form == "sigmoid" else _softmax
    sides = [_Side(*both) for both in zip(pool.own, pool.everyone)]
    problems = [
        _Problem(level, sides[first], sides[first + 1 + c], level.weight / captions)
        for level, first in zip(levels, range(0, len(sides), 1 + captions))
        for c in range(captions)
    ]
    parts = kernel(problems, pool, answers, config)
    gradients = [_level_gradient(parts[n * captions : (n + 1) * captions], captions) for n in range(len(levels))]
    by_pair = torch.stack([part.by_pair for part in parts]).unflatten(0, (len(levels), captions))
    weights = by_pair.new_tensor([level.weight for level in levels])
    own_pairs = int((pool.own_ids >= 0).sum())
    value = (weights @ by_pair.mean(1)).sum() / max(own_pairs, 1)
    return ContrastiveLoss(by_pair, value, gradients, answers.pairs, own_pairs, answers.repeated)


def exchange_and_compare(
    features: Sequence[Tensor], levels: Sequence[Level], ids: Tensor, group: Group, config: LossConfig
) -> ContrastiveLoss:
    """`contrastive_loss` of one batch: N (1 + C) matrices ``features`` [n, E], the pairs' group ``ids`` int64 [n]."""
    exchange = Exchange(ids, group, 1, config.exchange)
    exchange.send(features)
    return contrastive_loss(levels, exchange.receive(), config)


@dataclass(frozen=True)
class _Side:
    own: Tensor
    everyone: Tensor


@dataclass(frozen=True)
class _Problem:
    """One set of captions at one level."""

    level: Level
    image: _Side
    text: _Side
    weight: float

    @property
    def scale(self) -> Tensor:
        return self.level.logit_scale.detach().to(self.image.own.dtype).exp()


@dataclass(frozen=True)
class _Part:
    """Of one problem: loss by pair [n], gradients [n, E] of own rows, of the scale and the bias."""

    by_pair: Tensor
    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None


def _sides(problem: _Problem, answers: Answers, alone: bool) -> list[Logits]:
    """Own pictures against all captions and own captions against all pictures; alone, the first is both."""
    scale, image, text = problem.scale, problem.image, problem.text
    sides = [Logits(scale * image.own, text.everyone, answers, alone)]
    return sides if alone else [*sides, Logits(scale * text.own, image.everyone, answers, False)]


def _softmax(problems: list[_Problem], pool: Pool, answers: Answers, config: LossConfig) -> list[_Part]:
    alone, smoothing = pool.group.size == 1, config.label_smoothing
    statistics: list[tuple[Sums, Sums]] = []
    for problem in problems:
        found = [softmax_sums(side, smoothing) for side in _sides(problem, answers, alone)]
        column = found[0][1] if alone else found[1][0]
        assert column is not None
        statistics.append((found[0][0], column))
    if alone:
        lse = [(row.lse, column.lse) for row, column in statistics]
    else:
        packed = torch.stack([sums.lse for pair in statistics for sums in pair], dim=1)
        gathered = pool.gather(packed, "log-sum-exp")
        lse = [(gathered[:, 2 * i].contiguous(), gathered[:, 2 * i + 1].contiguous()) for i in range(len(statistics))]
    parts = []
    for problem, (row, column), (all_rows, all_columns) in zip(problems, statistics, lse):
        sides = _sides(problem, answers, alone)
        image, text = softmax_gradients(sides[0], row.lse, all_columns, smoothing)
        if not alone:
            text, _ = softmax_gradients(sides[1], column.lse, all_rows, smoothing)
        assert text is not None
        by_pair = (row.loss + column.loss) / 2
        parts.append(_part(problem, answers, alone, sides[0].rows, by_pair, image, text, None, 0.5 / answers.pairs))
    return parts


def _sigmoid(problems: list[_Problem], pool: Pool, answers: Answers, config: LossConfig) -> list[_Part]:
    alone = pool.group.size == 1
    parts = []
    for problem in problems:
        assert problem.level.logit_bias is not None
        bias = problem.level.logit_bias.detach().to(problem.image.own.dtype)
        sides = _sides(problem, answers, alone)
        found = [sigmoid_pass(side, bias) for side in sides]
        first = found[0]
        text = first.d_columns if alone else found[1].d_rows
        column_loss = first.column_loss if alone else found[1].row_loss
        assert text is not None
        by_pair = (first.row_loss + column_loss) / 2
        parts.append(
            _part(
                problem, answers, alone, sides[0].rows, by_pair, first.d_rows, text, first.d_bias, 1.0 / answers.pairs
            )
        )
    return parts


def _part(
    problem: _Problem, answers: Answers, alone: bool, scaled: Tensor, by_pair: Tensor,
    image: Tensor, text: Tensor, bias: Tensor | None, share: float,
) -> _Part:  # fmt: skip
    """From sums over the other side's rows to gradients of L: times s for own rows, weight and 1 / B (in place)."""
    share *= problem.weight
    if answers.valid is not None:
        for gradient in (image, text):
            gradient.mul_(answers.valid[:, None])
    scale_gradient = share * torch.linalg.vecdot(scaled, image).sum()
    image.mul_(share * problem.scale)
    # Alone, the columns' sum was over rows that carry s already.
    text.mul_(share if alone else share * problem.scale)
    return _Part(by_pair, image, text, scale_gradient, None if bias is None else share * bias)


def _level_gradient(parts: list[_Part], captions: int) -> LevelGradient:
    image = parts[0].image
    for part in parts[1:]:
        image += part.image
    bias = [part.logit_bias for part in parts if part.logit_bias is not None]
    return LevelGradient(
        [image, *(part.text for part in parts)],
        torch.stack([part.logit_scale for part in parts]).sum(0, keepdim=True),
        torch.stack(bias).sum(0, keepdim=True) if bias else None,
    )
