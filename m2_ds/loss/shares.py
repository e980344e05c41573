"""The loss shared out over tensor-parallel ranks, which all hold the same features.

Each compares its share of every micro-batch's rows, as if it were a rank of the contrast group with fewer pairs: no
pair is its own negative, and no row is compared twice. What each found is put together again.
Legend: r tensor-parallel ranks, k micro-batches, b pairs of one, s = ceil(b / r) rows of a share, N levels, C captions.
"""

from dataclasses import replace

import torch
from torch import Tensor

from m2_ds.loss.answers import PADDING
from m2_ds.loss.contrastive import ContrastiveLoss, LevelGradient
from m2_ds.parallel.collectives import all_gather_rows, all_reduce_sum
from m2_ds.parallel.mesh import Group

KIND = "shares of the loss"


class Shares:
    """``group``: the tensor-parallel ranks; one rank has everything."""

    def __init__(self, group: Group, micro_batches: int, pairs: int) -> None:
        self.group, self.micro_batches, self.pairs = group, micro_batches, pairs
        self.size = -(-pairs // group.size)

    def own(self, x: Tensor, fill: float = 0) -> Tensor:
        """Of one micro-batch's rows [b, ...] this rank's [s, ...]; ``fill`` stands in where b does not divide."""
        if self.group.size == 1:
            return x
        missing = self.size * self.group.size - len(x)
        x = torch.cat([x, x.new_full((missing, *x.shape[1:]), fill)]) if missing else x
        return x.chunk(self.group.size)[self.group.rank]

    def own_ids(self, ids: Tensor) -> Tensor:
        """Of all micro-batches' group ids [k b] this rank's [k s]."""
        return torch.cat([self.own(part, PADDING) for part in ids.split(self.pairs)])

    def join(self, loss: ContrastiveLoss) -> ContrastiveLoss:
        """The loss of all k b pairs, from the shares."""
        if self.group.size == 1:
            return loss
        rows = torch.stack([x for level in loss.gradients for x in level.features], 1)
        matrices = iter(self._gather(rows).unbind(1))
        once = [x for level in loss.gradients for x in (level.logit_scale, level.logit_bias) if x is not None]
        counts = loss.value.new_tensor([loss.own_pairs, float(loss.repeated)])
        summed = all_reduce_sum(torch.cat([*once, loss.value[None] * counts[0], counts]), self.group, KIND)
        *parameters, value, own_pairs, repeated = summed.split(1)
        found = iter(parameters)
        levels = [
            LevelGradient(
                [next(matrices) for _ in level.features],
                next(found),
                None if level.logit_bias is None else next(found),
            )
            for level in loss.gradients
        ]
        by_pair = self._gather(loss.by_pair.movedim(-1, 0)).movedim(0, -1)
        value = (value / own_pairs.clamp(min=1)).reshape(())
        return replace(loss, by_pair=by_pair, value=value, gradients=levels, repeated=repeated.reshape(()))

    def _gather(self, x: Tensor) -> Tensor:
        """[k s, ...] of every rank -> [k b, ...]"""
        everyone = all_gather_rows(x, self.group, KIND).unflatten(0, (self.group.size, self.micro_batches, self.size))
        return everyone.transpose(0, 1).flatten(1, 2)[:, : self.pairs].flatten(0, 1)
