"""What was sent: bytes and seconds by kind, counted where collectives are called.

A rank's bytes are those that a ring algorithm sends for it (n ranks, x bytes of the tensor that is gathered, reduced or
scattered): all-gather of own x: (n - 1) x; reduce-scatter or reduce of x: (n - 1) / n x; all-reduce of x: 2 (n - 1) / n
x; broadcast of x: (n - 1) / n x, as the mean over ranks. Seconds are those in which the host was held up: on a GPU,
where collectives run beside it, next to nothing.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m2_ds.parallel.activity import Activity


class Traffic:
    """Counters by kind since `take` was last called. ``activity``: what this process does now, collectives included."""

    def __init__(self) -> None:
        self.activity = Activity()
        self.bytes: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def sending(self, kind: str, sent: float) -> Iterator[None]:
        """Count ``sent`` bytes and the time until the block ends."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.bytes[kind] += sent
            self.seconds[kind] += time.perf_counter() - started

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Forget what is sent inside."""
        before = dict(self.bytes), dict(self.seconds)
        yield
        for counter, kept in zip((self.bytes, self.seconds), before):
            counter.clear()
            counter.update(kept)

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """(bytes, seconds) by kind; counting starts anew."""
        found = dict(self.bytes), dict(self.seconds)
        self.bytes.clear()
        self.seconds.clear()
        return found


def size_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


# Of DeepSpeed's communication backend: the position and name of the tensor that counts, the share of it that a ring
# sends per n - 1 ranks, and what it is sent for. ZeRO's engines use these for nothing else; tensors of whole numbers
# and single numbers (overflow flags, norms) are told apart as "control".
_METHODS: dict[str, tuple[int, str, Callable[[int], float], str]] = {
    "all_reduce": (0, "tensor", lambda n: 2 / n, "gradients"),
    "inference_all_reduce": (0, "tensor", lambda n: 2 / n, "gradients"),
    "all_reduce_coalesced": (0, "tensors", lambda n: 2 / n, "gradients"),
    "reduce": (0, "tensor", lambda n: 1 / n, "gradients"),
    "reduce_scatter_tensor": (1, "input_tensor", lambda n: 1 / n, "gradients"),
    "reduce_scatter": (1, "input_list", lambda n: 1 / n, "gradients"),
    "all_gather_into_tensor": (1, "input_tensor", lambda n: 1, "parameters"),
    "all_gather": (1, "tensor", lambda n: 1, "parameters"),
    "all_gather_coalesced": (1, "input_tensors", lambda n: 1, "parameters"),
    "broadcast": (0, "tensor", lambda n: 1 / n, "parameters"),
    "send": (0, "tensor", lambda n: 1 / (n - 1), "pipeline"),
}


def count_deepspeed(backend: Any, traffic: Traffic) -> None:
    """Let DeepSpeed's communication backend (an object) count what its collectives send."""
    for name in _METHODS.keys() & set(dir(backend)):
        setattr(backend, name, _counted(getattr(backend, name), traffic, name, *_METHODS[name]))


def _counted(
    call: Callable[..., Any],
    traffic: Traffic,
    method: str,
    place: int,
    name: str,
    share: Callable[[int], float],
    kind: str,
) -> Callable[..., Any]:
    @wraps(call)
    def counted(*arguments: Any, **named: Any) -> Any:
        value = named[name] if name in named else arguments[place]
        tensors = [value] if isinstance(value, Tensor) else list(value)
        # DeepSpeed hands some of its groups over by position; without one it means all ranks.
        given = (x for x in (*arguments, *named.values()) if isinstance(x, dist.ProcessGroup))
        ranks = dist.get_world_size(next(given, None))
        small = all(x.numel() <= 1 or not torch.is_floating_point(x) for x in tensors)
        sent = sum(map(size_of, tensors)) * share(ranks) * (ranks - 1)
        counted_as = "control" if small else kind
        collective = f"DeepSpeed's {method} of {counted_as} among {ranks} ranks"
        with traffic.activity.waiting_in(collective), traffic.sending(counted_as, sent):
            return call(*arguments, **named)

    return counted
