"""Collectives that every caller names a group for. A group of one returns its input."""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from m2_ds.parallel.mesh import Group

T = TypeVar("T")


def all_gather_rows(x: Tensor, group: Group) -> Tensor:
    """Concatenate equal-shaped tensors [b, ...] of all ranks along the first axis, in rank order: [size * b, ...].

    Carries no gradient: callers that need one compute it in closed form from what they gathered.
    """
    if group.size == 1:
        return x.detach()
    out = x.new_empty((group.size * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.detach().contiguous(), group=group.process_group)
    return out


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks; ``x`` itself is left as it is."""
    out = x.detach().clone()
    if group.size > 1:
        dist.all_reduce(out, group=group.process_group)
    return out


def barrier(group: Group) -> None:
    if group.size > 1:
        dist.barrier(group=group.process_group)


def broadcast_object(value: T, group: Group) -> T:
    """The first rank's picklable ``value``, on every rank."""
    if group.size == 1:
        return value
    box: list[T] = [value]
    dist.broadcast_object_list(box, group_src=0, group=group.process_group)
    return box[0]


def all_gather_objects(value: T, group: Group) -> list[T]:
    """Every rank's picklable ``value``, in rank order."""
    if group.size == 1:
        return [value]
    out: list[T | None] = [None] * group.size
    dist.all_gather_object(out, value, group=group.process_group)
    return out  # type: ignore[return-value]
