"""Seconds of collectives on a cluster's links, for ranks laid out tensor fastest, then data, then pipeline.

Collectives are rings in rank order: each moves a rank's bytes over the slowest of its edges, and every hop costs a
latency. A node's link carries the bytes of each ring edge that leaves it, and is shared by them.
"""

import math
from dataclasses import dataclass

from m2_ds.plan.cluster import Cluster, Collective
from m2_ds.plan.layout import Candidate

# Kinds of traffic: which ranks talk, by which collective, in hops of one ring a message.
_KINDS: dict[str, tuple[str, Collective]] = {
    "gradients": ("data", "all_reduce"),
    "parameters": ("data", "all_gather"),
    "features": ("contrast", "all_gather"),
    "ids": ("contrast", "all_gather"),
    "log-sum-exp": ("contrast", "all_gather"),
    "shares of the loss": ("tensor", "all_gather"),
    "tensor parallel": ("tensor", "all_reduce"),
    "tensor parallel norms": ("tensor", "all_reduce"),
    "pipeline": ("pipeline", "send"),
    "masked": ("data", "all_reduce"),
    "batches": ("model", "send"),
}
_WIDE = ("tensor parallel norms", "masked")  # sums that are fp32 or fp64 whatever the precision


@dataclass(frozen=True)
class Ring:
    """``ranks`` in a ring, ``leaving``: edges that leave a node at once over its link, of all rings; 0: none does."""

    ranks: int
    leaving: int


class Network:
    """A cluster's links as a candidate's groups use them."""

    def __init__(self, cluster: Cluster, candidate: Candidate, precision: str) -> None:
        self.cluster, c, self.precision = cluster, candidate, precision
        per_node = cluster.ranks_per_node
        self.rings = {
            "tensor": self._contiguous(c.tensor, 1),
            "data": self._contiguous(c.tensor * c.data, c.tensor),
            "contrast": self._contiguous(c.tensor * c.group, 1),
            # Neighbouring stages lie tensor x data ranks apart: all of a node's ranks send at once.
            "pipeline": Ring(c.pipeline, min(per_node, c.ranks) if c.tensor * c.data >= per_node else 0),
            "model": Ring(c.tensor * c.pipeline, 1 if c.pipeline > 1 and c.tensor * c.data >= per_node else 0),
        }
        self.stage, self.sequence = c.stage, c.sequence

    def _contiguous(self, span: int, rings: int) -> Ring:
        """``rings`` rings side by side over ``span`` neighbouring ranks."""
        crosses = span > self.cluster.ranks_per_node
        return Ring(span // rings, rings if crosses else 0)

    def seconds(self, kind: str, size: float, messages: float) -> float:
        """Of ``size`` bytes that a rank sends in ``messages`` collectives of a kind."""
        where, collective = _KINDS[kind]
        if kind == "gradients" and self.stage == 3:
            collective = "reduce_scatter"
        elif collective == "all_reduce" and self.precision == "bf16" and kind not in _WIDE:
            collective = "all_reduce_bf16"
        ring = self.rings[where]
        if ring.ranks == 1 or not size:
            return 0.0
        intra, inter = self.cluster.intra, self.cluster.inter
        # With sequence parallelism an all-reduce is a reduce-scatter and, later, an all-gather: half of its bytes each.
        halves: tuple[Collective, ...] = ("reduce_scatter", "all_gather")
        ways = halves if self.sequence and kind == "tensor parallel" else (collective,)
        moved = 0.0
        for way in ways:
            bandwidth = intra.bytes_per_s(way)
            if ring.leaving:
                bandwidth = min(inter.bytes_per_s(way) / ring.leaving, bandwidth)
            moved += size / len(ways) / bandwidth
        return moved + messages * self._latency(ring, collective)

    def _latency(self, ring: Ring, collective: Collective) -> float:
        """Seconds of a message's hops. All-reduces between GPUs' nodes go by trees (NCCL), everything else by rings."""
        if collective == "send":
            return (self.cluster.inter if ring.leaving else self.cluster.intra).latency_us / 1e6
        nodes = 1 if not ring.leaving else -(-ring.ranks * ring.leaving // self.cluster.ranks_per_node)
        reduces = collective.startswith("all_reduce")
        between = 0 if nodes == 1 else nodes
        within = ring.ranks - (nodes if nodes > 1 else 1)
        if reduces and nodes > 1 and self.cluster.device == "gpu":
            between, within = math.ceil(math.log2(nodes)), -(-ring.ranks // nodes) - 1
        once = within * self.cluster.intra.latency_us + between * self.cluster.inter.latency_us
        return once * (2 if reduces else 1) / 1e6
