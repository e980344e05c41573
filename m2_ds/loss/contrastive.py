"""The contrastive loss (ITC) and its gradients in closed form, from one all-gather of features and one of log-sum-exps.

Legend: g ranks of the group, b own pairs, B = g b pairs, C captions a picture, N levels, E embedding.

With S = s I T^T over the B pairs (s = exp(logit_scale), rows unit vectors) and Y the right answers (rows sum to 1):

    L = 1 / (2 B) [ sum_i (lse_j S_ij - sum_j Y_ij S_ij) + sum_j (lse_i S_ij - sum_i Y_ji S_ij) ]
    dL/dS_ij = 1 / (2 B) [ exp(S_ij - row_i) + exp(S_ij - col_j) - Y_ij - Y_ji ]

A rank computes the rows of its own pictures and of its own captions, so it needs all features and all log-sum-exps but
no gradient of anyone else: no communication in backward. (CLIP, arXiv 2103.00020, with both gathers made exact.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m2_ds.loss.config import Repeats
from m2_ds.parallel.collectives import all_gather_rows
from m2_ds.parallel.mesh import Group


@dataclass(frozen=True)
class Level:
    """Unit vectors of own pairs at one level: ``image`` [b, E], ``text`` [C, b, E], and the level's logit scale [1]."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class ContrastiveLoss:
    """``total``: what to call backward on, this rank's share of the loss. ``by_pair``: [N, C, b] loss of each own pair.

    The group's loss is the mean of ``by_pair`` over captions and all ranks' pairs, weighted over levels.
    """

    total: Tensor
    by_pair: Tensor


def contrastive_loss(
    levels: Sequence[Level], pair_groups: Tensor, group: Group, repeats: Repeats = "positive"
) -> ContrastiveLoss:
    """Weighted sum over levels of the mean over captions of ITC over the group's pairs.

    ``pair_groups``: int64 [b], equal for pairs that show the same thing (see LossConfig.repeats). Every rank must bring
    the same number of pairs. The arithmetic is in fp32, or in the features' precision where that is higher.

    The engine averages gradients over the group's ranks, so what each rank sends backward is ``group.size`` times its
    share: the average is then the gradient of the loss. This is the only place where that factor stands.
    """
    flat: list[Tensor] = []
    for level in levels:
        flat += [level.image, *level.text]
    packed = torch.stack([_at_least_fp32(x) for x in flat], dim=1)  # [b, N (1 + C), E]
    everyone = all_gather_rows(packed, group)
    right = _Answers(pair_groups, all_gather_rows(pair_groups, group), group, repeats)

    pairs, index = [], 0
    for level in levels:
        captions = level.text.shape[0]
        for c in range(captions):
            columns = (index, index + 1 + c)
            pairs.append((columns, _at_least_fp32(level.logit_scale.detach()).exp(), level.weight / captions))
        index += 1 + captions

    statistics = [_rows(packed.detach(), everyone, columns, scale, right) for columns, scale, _ in pairs]
    lse = torch.stack([s for stat in statistics for s in (stat.row_lse, stat.col_lse)], dim=1)  # [b, 2 N C]
    all_lse = all_gather_rows(lse, group)

    gradient = torch.zeros_like(packed)
    scale_gradients = []
    for n, ((columns, scale, weight), stat) in enumerate(zip(pairs, statistics)):
        d_image, d_text, d_scale = _gradients(everyone, columns, scale, stat, all_lse[:, 2 * n], all_lse[:, 2 * n + 1])
        gradient[:, columns[0]] += weight * d_image
        gradient[:, columns[1]] += weight * d_text
        scale_gradients.append(weight * d_scale)
    captions = levels[0].text.shape[0]
    d_scales = [torch.stack(scale_gradients[i : i + captions]).sum(0) for i in range(0, len(pairs), captions)]
    by_pair = torch.stack([(s.row_loss + s.col_loss) / 2 for s in statistics]).unflatten(0, (len(levels), captions))
    weights = by_pair.new_tensor([level.weight for level in levels])
    value = (weights @ by_pair.mean(1)).mean()
    total = _WithGradient.apply(
        value,
        gradient * group.size,
        [d * group.size for d in d_scales],
        packed,
        *[level.logit_scale for level in levels],
    )
    return ContrastiveLoss(total, by_pair)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Answers:
    """Which columns are right for own rows, and which do not count."""

    def __init__(self, own: Tensor, everyone: Tensor, group: Group, repeats: Repeats) -> None:
        first = group.rank * len(own)
        diagonal = torch.arange(first, first + len(own), device=own.device)
        same = own[:, None] == everyone[None, :]  # [b, B]
        self_only = torch.zeros_like(same).scatter_(1, diagonal[:, None], True)
        self.right = same if repeats == "positive" else self_only
        self.excluded = same & ~self_only if repeats == "exclude" else None
        self.count = self.right.sum(1)


@dataclass(frozen=True)
class _Rows:
    row: Tensor  # [b, B] logits of own pictures against all captions
    col: Tensor  # [b, B] logits of own captions against all pictures
    row_lse: Tensor  # [b]
    col_lse: Tensor  # [b]
    row_loss: Tensor  # [b]
    col_loss: Tensor  # [b]
    target: Tensor  # [b, B], rows sum to 1; symmetric over the group, as equal groups have equal counts


def _rows(own: Tensor, everyone: Tensor, columns: tuple[int, int], scale: Tensor, answers: _Answers) -> _Rows:
    image, text = columns
    row = scale * (own[:, image] @ everyone[:, text].T)
    col = scale * (own[:, text] @ everyone[:, image].T)
    if answers.excluded is not None:
        row, col = (x.masked_fill(answers.excluded, -torch.inf) for x in (row, col))
    target = answers.right.to(row.dtype) / answers.count[:, None]
    row_lse, col_lse = row.logsumexp(1), col.logsumexp(1)
    right_row, right_col = ((x.masked_fill(~answers.right, 0) * target).sum(1) for x in (row, col))
    return _Rows(row, col, row_lse, col_lse, row_lse - right_row, col_lse - right_col, target)


def _gradients(
    everyone: Tensor, columns: tuple[int, int], scale: Tensor, stat: _Rows, all_row_lse: Tensor, all_col_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    image, text = columns
    half = 0.5 / len(everyone)
    d_row = half * ((stat.row - stat.row_lse[:, None]).exp() + (stat.row - all_col_lse).exp() - 2 * stat.target)
    d_col = half * ((stat.col - stat.col_lse[:, None]).exp() + (stat.col - all_row_lse).exp() - 2 * stat.target)
    # Own pictures' rows over all ranks cover every S_ij once: their sum over the group is the scale's gradient.
    d_scale = (d_row * stat.row.masked_fill(stat.row == -torch.inf, 0)).sum()
    return scale * (d_row @ everyone[:, text]), scale * (d_col @ everyone[:, image]), d_scale


class _WithGradient(torch.autograd.Function):
    """A value whose gradients towards features and scales are already known."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradient: Tensor, d_scales: list[Tensor], packed: Tensor, *scales: Tensor
    ) -> Tensor:
        ctx.gradient = gradient
        ctx.d_scales = [d.reshape(s.shape).to(s.dtype) for d, s in zip(d_scales, scales)]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (outer,) = grads
        return None, None, None, outer * ctx.gradient, *[outer * d for d in ctx.d_scales]
