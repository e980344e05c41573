"""Collectives that every caller names a group and a kind for. A group of one returns its input.

``kind`` is the name under which the group's traffic counts the bytes. A collective that fails (a rank that is gone, one
that did not come in time) is told with its kind and group.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from m2_ds.parallel.mesh import Group
from m2_ds.parallel.traffic import size_of

T = TypeVar("T")


class Gathering:
    """An all-gather under way. `wait` gives the rows of all ranks."""

    def __init__(self, out: Tensor, work: Any, group: Group, kind: str) -> None:
        self.out, self.work, self.group, self.kind = out, work, group, kind

    def wait(self) -> Tensor:
        """On a GPU only the current stream waits, not the host."""
        if self.work is not None:
            with _told(self.group, f"all-gather of {self.kind}"), self.group.traffic.sending(self.kind, 0):
                self.work.wait()
            self.work = None
        return self.out


def start_all_gather(x: Tensor, group: Group, kind: str, out: Tensor | None = None) -> Gathering:
    """Begin to concatenate equal-shaped tensors [b, ...] along the first axis, in rank order: [size * b, ...].

    Carries no gradient: callers that need one compute it in closed form from what they gathered. ``out``: where to put
    the rows.
    """
    x = x.detach()
    if group.size == 1:
        return Gathering(x if out is None else out.copy_(x), None, group, kind)
    out = x.new_empty((group.size * x.shape[0], *x.shape[1:])) if out is None else out
    with _told(group, f"all-gather of {kind}"), group.traffic.sending(kind, (group.size - 1) * size_of(x)):
        work = dist.all_gather_into_tensor(out, x.contiguous(), group=group.process_group, async_op=True)
    return Gathering(out, work, group, kind)


def all_gather_rows(x: Tensor, group: Group, kind: str) -> Tensor:
    """`start_all_gather`, waited for."""
    return start_all_gather(x, group, kind).wait()


def all_reduce_sum(x: Tensor, group: Group, kind: str) -> Tensor:
    """The sum over ranks; ``x`` itself is left as it is."""
    out = x.detach().clone()
    if group.size > 1:
        sent = 2 * (group.size - 1) / group.size * size_of(x)
        with _told(group, f"all-reduce of {kind}"), group.traffic.sending(kind, sent):
            dist.all_reduce(out, group=group.process_group)
    return out


class Reducing:
    """An all-reduce under way, into the tensor that was given."""

    def __init__(self, work: Any, group: Group, kind: str) -> None:
        self.work, self.group, self.kind = work, group, kind

    def wait(self) -> None:
        """On a GPU only the current stream waits, not the host."""
        if self.work is not None:
            with _told(self.group, f"all-reduce of {self.kind}"), self.group.traffic.sending(self.kind, 0):
                self.work.wait()
            self.work = None


def start_all_reduce(x: Tensor, group: Group, kind: str) -> Reducing:
    """Begin to sum a contiguous ``x`` over ranks, in place. Carries no gradient."""
    if group.size == 1:
        return Reducing(None, group, kind)
    sent = 2 * (group.size - 1) / group.size * size_of(x)
    with _told(group, f"all-reduce of {kind}"), group.traffic.sending(kind, sent):
        work = dist.all_reduce(x, group=group.process_group, async_op=True)
    return Reducing(work, group, kind)


def reduce_scatter_rows(x: Tensor, group: Group, kind: str) -> Tensor:
    """Rank i's share of the sum over ranks: the i-th [n / size, ...] of ``x`` [n, ...]. Carries no gradient."""
    if group.size == 1:
        return x
    out = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    sent = (group.size - 1) / group.size * size_of(x)
    with _told(group, f"reduce-scatter of {kind}"), group.traffic.sending(kind, sent):
        dist.reduce_scatter_tensor(out, x, group=group.process_group)
    return out


def broadcast(x: Tensor, group: Group, first: int, kind: str) -> Tensor:
    """Overwrite ``x`` with that of the rank at place ``first`` of the group."""
    if group.size > 1:
        sent = (group.size - 1) / group.size * size_of(x)
        with _told(group, f"broadcast of {kind}"), group.traffic.sending(kind, sent):
            dist.broadcast(x, group=group.process_group, group_src=first)
    return x


def send(x: Tensor, to: int, group: Group, kind: str) -> None:
    """To the rank at place ``to`` of the group, which must `receive`."""
    with _told(group, f"send of {kind}"), group.traffic.sending(kind, size_of(x)):
        dist.send(x.contiguous(), group=group.process_group, group_dst=to)


def receive(out: Tensor, sender: int, group: Group, kind: str) -> Tensor:
    with _told(group, f"receive of {kind}"), group.traffic.sending(kind, 0):
        dist.recv(out, group=group.process_group, group_src=sender)
    return out


def barrier(group: Group) -> None:
    if group.size > 1:
        with _told(group, "barrier"):
            dist.barrier(group=group.process_group)


def broadcast_object(value: T, group: Group) -> T:
    """The first rank's picklable ``value``, on every rank."""
    if group.size == 1:
        return value
    box: list[T] = [value]
    with _told(group, "broadcast of an object"):
        dist.broadcast_object_list(box, group_src=0, group=group.process_group)
    return box[0]


def all_gather_objects(value: T, group: Group) -> list[T]:
    """Every rank's picklable ``value``, in rank order."""
    if group.size == 1:
        return [value]
    out: list[T | None] = [None] * group.size
    with _told(group, "all-gather of objects"):
        dist.all_gather_object(out, value, group=group.process_group)
    return out  # type: ignore[return-value]


@contextlib.contextmanager
def _told(group: Group, what: str) -> Iterator[None]:
    """Note it as what this process waits for; put it, and the group, before an error of the communication library."""
    collective = f"{what} in {group.name}"
    try:
        with group.traffic.activity.waiting_in(collective):
            yield
    except RuntimeError as error:
        raise RuntimeError(f"{collective}: {error}") from error


def gather(x: Tensor, group: Group, kind: str) -> list[Tensor] | None:
    """Equal-shaped tensors of all ranks, in rank order, on the first of them; None on the others."""
    if group.size == 1:
        return [x]
    out = [x.new_empty(x.shape) for _ in range(group.size)] if group.is_first else None
    sent = (group.size - 1) / group.size * size_of(x)
    with _told(group, f"gather of {kind}"), group.traffic.sending(kind, sent):
        dist.gather(x.contiguous(), out, group=group.process_group, group_dst=0)
    return out
