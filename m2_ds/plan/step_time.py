"""Time of a contrastive training step from arithmetic, bandwidth and latency, to calibrate and to extrapolate with.

Collectives are rings over ranks in node order. A ring of n ranks moves (n - 1) x for an all-gather of x bytes a rank,
2 (n - 1) / n x for an all-reduce of x; every hop costs a latency. A node's link carries the bytes of each ring edge
that leaves it, and is shared by them. Nothing overlaps: what a GPU hides behind its arithmetic comes on top of the
speed that is predicted here.

Legend: N data-parallel ranks, g ranks of a contrast group, k micro-batches of b pairs, M matrices of features (levels x
(1 + captions)), E embedding.
"""

from dataclasses import dataclass
from typing import Literal

from m2_ds.parallel.config import Placement

Method = Literal["global", "grouped", "regather"]


@dataclass(frozen=True)
class Fabric:
    """Nodes of ``ranks_per_node``; bandwidths in bytes/s each way (of a node's link, between two ranks of a node),
    latencies of one hop in seconds."""

    ranks_per_node: int
    inter_bandwidth: float
    intra_bandwidth: float
    inter_latency: float
    intra_latency: float


@dataclass(frozen=True)
class Work:
    """What a rank computes and sends. Seconds: a forward without gradient, forward with backward, the update, and
    ``logit_s``, forward and backward of one logit at all levels and captions."""

    micro_batch: int
    matrices: int
    embed_dim: int
    parameters: float
    forward_s: float
    forward_backward_s: float
    update_s: float
    logit_s: float = 0.0
    feature_bytes: int = 4
    gradient_bytes: int = 4


@dataclass(frozen=True)
class Layout:
    """``global``: every micro-batch a step of its own, features gathered over all ranks and their gradients scattered
    back; ``grouped``: the exact grouped step (g, k); ``regather``: accumulation that gathers all k features anew for
    each micro-batch, with gradient, and reduces gradients each time (open_clip's)."""

    method: Method
    ranks: int
    group: int
    micro_batches: int
    placement: Placement = "contiguous"
    kept_graphs: int = 1


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by part, bytes a rank sends, and pairs of all ranks."""

    arithmetic: float
    features: float
    gradients: float
    feature_bytes: float
    gradient_bytes: float
    pairs: int

    @property
    def total(self) -> float:
        return self.arithmetic + self.features + self.gradients

    @property
    def samples_per_s(self) -> float:
        return self.pairs / self.total


def step_time(work: Work, fabric: Fabric, layout: Layout) -> StepTime:
    """One optimizer step of a layout."""
    k, n, g = layout.micro_batches, layout.ranks, layout.group
    own = work.micro_batch * work.matrices * work.embed_dim * work.feature_bytes  # of one micro-batch
    again = {"global": 0, "regather": k, "grouped": max(0, k - layout.kept_graphs)}[layout.method]
    arithmetic = k * work.forward_backward_s + again * work.forward_s + work.update_s
    square = work.micro_batch**2  # own rows times columns of the contrastive batch, in micro-batches, times how often
    logits = square * {"global": k * n, "regather": k * k * n * k, "grouped": k * g * k}[layout.method]
    arithmetic += logits * work.logit_s
    if layout.method == "grouped":
        rows = k * work.micro_batch
        sums = 4 * rows * work.matrices  # two a level and caption: as many as matrices where captions are one
        times = [(k, _gather(fabric, g, own, layout.placement)), (1, _gather(fabric, g, sums, layout.placement))]
        features = sum(count * seconds for count, seconds in times)
        feature_bytes = (g - 1) * (k * own + sums)
        reductions = 1
    else:
        regathered = k * own if layout.method == "regather" else own
        features = k * 2 * _gather(fabric, n, regathered, "contiguous")  # and its reduce-scatter, which moves as much
        feature_bytes = k * 2 * (n - 1) * regathered
        reductions = k
    size = work.parameters * work.gradient_bytes
    gradients = reductions * _reduce(fabric, n, size)
    gradient_bytes = reductions * 2 * (n - 1) / n * size
    pairs = n * k * work.micro_batch
    if layout.method == "global":
        arithmetic += (k - 1) * work.update_s
    return StepTime(arithmetic, features, gradients, feature_bytes, gradient_bytes, pairs)


def _gather(fabric: Fabric, ranks: int, own: float, placement: Placement) -> float:
    """Seconds of a ring all-gather of ``own`` bytes a rank inside every group of ``ranks`` at once."""
    if ranks == 1:
        return 0.0
    bandwidth, latency = _slowest(fabric, ranks, placement)
    return (ranks - 1) * (own / bandwidth + latency)


def _reduce(fabric: Fabric, ranks: int, size: float) -> float:
    """Seconds of a ring all-reduce of ``size`` bytes."""
    if ranks == 1:
        return 0.0
    bandwidth, latency = _slowest(fabric, ranks, "contiguous")
    return 2 * (ranks - 1) * (size / ranks / bandwidth + latency)


def _slowest(fabric: Fabric, ranks: int, placement: Placement) -> tuple[float, float]:
    """Bandwidth and latency of the slowest edge of a group's ring."""
    if placement == "contiguous" and ranks <= fabric.ranks_per_node:
        return fabric.intra_bandwidth, fabric.intra_latency
    # Contiguous, one edge leaves each node; strided, one for every rank of the node.
    edges = 1 if placement == "contiguous" else fabric.ranks_per_node
    return fabric.inter_bandwidth / edges, fabric.inter_latency
