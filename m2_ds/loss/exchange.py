"""The one gather of features: micro-batch by micro-batch, each while the next is computed.

Legend: g ranks of the group, k micro-batches, b pairs of one, n = k b own pairs, B = g k b, C captions a picture,
N levels, M = N (1 + C) matrices of features, E embedding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from m2_ds.loss.config import Precision
from m2_ds.parallel.collectives import Gathering, all_gather_rows, start_all_gather
from m2_ds.parallel.mesh import Group


class _HostCopy:
    """A tensor on its way to the host: asked for before the step's work, it is there when the loss needs it."""

    def __init__(self, x: Tensor) -> None:
        self.out, self.arrived = x, None
        if x.device.type == "cuda":
            self.out = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def get(self) -> Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.out


class Exchange:
    """Sends own features of k micro-batches to the group and holds what came back.

    Columns of the contrastive batch are ordered by (micro-batch, rank, pair).
    """

    def __init__(self, ids: Tensor, group: Group, micro_batches: int, precision: Precision = "fp32") -> None:
        """``ids`` int64 [n]: the pairs' groups; sent first, so that they are on the host when the loss needs them."""
        self.group, self.micro_batches, self.precision = group, micro_batches, precision
        self.own_ids = ids
        self._ids = _HostCopy(start_all_gather(ids, group, "ids").wait())
        self._sent: list[list[Tensor]] = []
        self._gatherings: list[Gathering] = []
        self._buffer: Tensor | None = None

    def send(self, features: Sequence[Tensor]) -> None:
        """The next micro-batch: M matrices [b, E] of unit vectors. Returns while they are under way."""
        own = [_at_least_fp32(x.detach()) for x in features]
        if self.group.size == 1:
            self._sent.append(own)
            return
        packed = torch.stack(own, dim=1)
        if self.precision == "bf16" and packed.dtype == torch.float32:
            packed = packed.bfloat16()
        if self._buffer is None:
            b, m, e = packed.shape
            self._buffer = packed.new_empty(self.micro_batches, self.group.size * b, m, e)
        out = self._buffer[len(self._gatherings)]
        self._gatherings.append(start_all_gather(packed, self.group, "features", out))

    def receive(self) -> "Pool":
        """Wait for everything that was sent."""
        ids = self._ids.get()
        g, k = self.group.size, self.micro_batches
        b = len(self.own_ids) // k
        place = torch.arange(g * k * b).view(k, g, b)[:, self.group.rank].reshape(-1)
        ids = ids.view(g, k, b).transpose(0, 1).reshape(-1)
        if g == 1:
            matrices = [torch.cat(parts) if k > 1 else parts[0] for parts in zip(*self._sent)]
            return Pool(self.group, k, ids, ids, place, matrices, matrices)
        for gathering in self._gatherings:
            gathering.wait()
        assert self._buffer is not None and len(self._gatherings) == k
        by_rank = self._buffer.unflatten(1, (g, b))[:, self.group.rank]  # [k, b, M, E]
        everyone = self._buffer.flatten(0, 1)
        count = everyone.shape[1]
        # Own rows as the others see them: in low precision both must take the same rounded numbers.
        own = [_at_least_fp32(by_rank[:, :, m].reshape(k * b, -1)) for m in range(count)]
        return Pool(self.group, k, ids[place], ids, place, own, [everyone[:, m] for m in range(count)])


class Pool:
    """All features of the contrastive batch: matrices ``own`` [n, E] and ``everyone`` [B, E], M of each.

    ``place`` int64 [n]: the column of each own row. With a group of one rank both are the same tensors.
    """

    def __init__(
        self, group: Group, micro_batches: int, own_ids: Tensor, ids: Tensor, place: Tensor,
        own: list[Tensor], everyone: list[Tensor],
    ) -> None:  # fmt: skip
        self.group, self.micro_batches = group, micro_batches
        self.own_ids, self.ids, self.place = own_ids, ids, place
        self.own, self.everyone = own, everyone

    def gather(self, x: Tensor, kind: str) -> Tensor:
        """[n, ...] of every rank -> [B, ...] in the columns' order."""
        everyone = all_gather_rows(x, self.group, kind)
        g, k = self.group.size, self.micro_batches
        return everyone.unflatten(0, (g, k, -1)).transpose(0, 1).flatten(0, 2)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
