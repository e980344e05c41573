"""One rank of benchmarks/grouped_aggregation.py: real steps of every method, timed; the first rank prints JSON."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import random_steps
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from m2_ds.data.stream import PairBatch
from m2_ds.engine.setup import quiet
from m2_ds.engine.step import ContrastiveStep
from m2_ds.parallel.collectives import barrier
from m2_ds.parallel.config import ContrastGroupConfig
from m2_ds.parallel.mesh import Group, Mesh
from m2_ds.parallel.traffic import size_of

NODES, RANKS_PER_NODE = 4, 2
RANKS = NODES * RANKS_PER_NODE
PAIRS = 16  # of a micro-batch
Kind = Literal["global", "grouped", "regather"]


@dataclass(frozen=True)
class Method:
    """What is trained with. ``kind`` as in m2_ds.plan.step_time."""

    kind: Kind
    group: int
    micro_batches: int
    placement: Literal["contiguous", "strided"] = "contiguous"

    @property
    def name(self) -> str:
        if self.kind == "global":
            return "global ITC"
        if self.kind == "regather":
            return f"open_clip-style, k {self.micro_batches}"
        strided = ", strided" if self.placement == "strided" else ""
        return f"GBA g {self.group}, k {self.micro_batches}{strided}"


METHODS = (
    Method("global", RANKS, 1),
    Method("grouped", 8, 1),
    Method("grouped", 2, 1),
    Method("grouped", 1, 1),
    Method("grouped", 8, 4),
    Method("grouped", 4, 4),
    Method("grouped", 4, 4, "strided"),
    Method("grouped", 2, 4),
    Method("grouped", 2, 8),
    Method("regather", RANKS, 4),
    Method("regather", RANKS, 8),
)


@dataclass
class Measured:
    """Means over the counted steps of one method at one rate. Seconds and bytes are of an optimizer step."""

    method: Method
    step_s: float
    samples_per_s: float
    waiting_s: float  # rank 0's host in collectives, for data and for slower ranks
    arithmetic_s: float  # CPU seconds of all ranks' steps over this machine's cores
    bytes: dict[str, float]  # by kind, a rank, as counted where collectives are called
    wire_bytes: float  # that left the first node's link


def work(steps: int) -> None:
    """Inside a rank: measure all methods; the first rank prints them as JSON."""
    torch.set_num_threads(1)
    quiet()
    mesh = Mesh.start(timeout_minutes=5)
    big, small = torch.zeros(1_000_000), torch.zeros(1)
    bandwidth = 2 * 7 / 8 * 4e6 / min(_seconds(lambda: dist.all_reduce(big), 3))
    latency = statistics.median(_seconds(lambda: dist.all_reduce(small), 20)) / (2 * (RANKS - 1))
    found = []
    for method in METHODS:
        here = mesh.with_contrast_group(ContrastGroupConfig(size=method.group, placement=method.placement))
        step = _step(method, here)
        step()
        step()
        count = max(2, steps // method.micro_batches)
        barrier(mesh.data_parallel)
        mesh.traffic.take()
        wire, cpu, started = _wire(), time.process_time(), time.perf_counter()
        for _ in range(count):
            step()
        barrier(mesh.data_parallel)
        seconds = (time.perf_counter() - started) / count
        used = torch.tensor([time.process_time() - cpu])
        sent, waited = mesh.traffic.take()
        wired = (_wire() - wire) / count
        dist.all_reduce(used)
        pairs = RANKS * PAIRS * method.micro_batches
        found.append(
            Measured(
                method,
                seconds,
                pairs / seconds,
                sum(waited.values()) / count,
                float(used) / count / min(RANKS, len(os.sched_getaffinity(0))),
                {kind: x / count for kind, x in sent.items()},
                wired,
            )
        )
    if mesh.is_first:
        print(json.dumps({"bandwidth": bandwidth, "latency": latency, "methods": [asdict(m) for m in found]}))
    mesh.stop()


def _seconds(call: Callable[[], Any], count: int) -> list[float]:
    call()
    found = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return found


def _wire() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def _step(method: Method, mesh: Mesh) -> Callable[[], object]:
    """One optimizer step of a fresh model."""
    model = {"preset": "test", "hidden_size": 128, "num_heads": 2, "embed_dim": 128, "vocab_size": 4000}
    batch = RANKS * PAIRS * method.micro_batches
    config = random_steps.run_config(model, zero=0, batch=batch, micro_batch=PAIRS, threads=1)
    engine = random_steps.training_engine(config, mesh)
    seeds = [mesh.rank * 100 + micro for micro in range(method.micro_batches)]
    batches = [random_steps.random_pairs(config.model, PAIRS, (12, 13), seed) for seed in seeds]
    if method.kind == "grouped":
        step = ContrastiveStep(engine, config, mesh, languages=1)
        return lambda: step(batches)
    return lambda: _regathering_step(engine, mesh, batches)


def _regathering_step(engine: Any, mesh: Mesh, batches: list[PairBatch]) -> None:
    """Plain ITC for one micro-batch; for several, all features gathered again around each one that has a graph."""

    def forward(batch: PairBatch) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        image, text, logits = engine(batch.images, batch.ids[0], batch.mask[0], None, None)
        return [image.unimodal, text.unimodal, image.vl, text.vl], logits.scale

    cached: list[list[Tensor]] = []
    if len(batches) > 1:
        with torch.no_grad():
            cached = [forward(batch)[0] for batch in batches]
    for number, batch in enumerate(batches):
        features, scales = forward(batch)
        parts = cached[:number] + [features] + cached[number + 1 :] if cached else [features]
        packed = torch.stack([torch.cat(same) for same in zip(*parts)], dim=1)
        everyone = _Gather.apply(packed, mesh.data_parallel)
        loss = _plain_loss(packed, everyone, scales, mesh.rank)
        last = number == len(batches) - 1
        engine.backward(loss, scale_wrt_gas=False)
        if not last:
            engine.buffered_allreduce_fallback()  # DistributedDataParallel reduces after every backward
        engine.step()


def _plain_loss(own: Tensor, everyone: Tensor, scales: Sequence[Tensor], rank: int) -> Tensor:
    """Cross entropy of own rows against everyone's columns, both ways, both levels."""
    target = torch.arange(rank * len(own), (rank + 1) * len(own))
    loss = torch.zeros(())
    for level, scale in enumerate(scales):
        i, t = 2 * level, 2 * level + 1
        for a, b in ((i, t), (t, i)):
            loss = loss + F.cross_entropy(scale.exp() * own[:, a] @ everyone[:, b].T, target) / 2
    return loss


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the gradients that all ranks have for a rank's rows (reduce-scatter)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size * len(x), *x.shape[1:])
        with group.traffic.sending("features", (group.size - 1) * size_of(x)):
            dist.all_gather_into_tensor(out, x.contiguous(), group=group.process_group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), group = grads, ctx.group
        own = grad.new_empty(len(grad) // group.size, *grad.shape[1:])
        with group.traffic.sending("feature gradients", (group.size - 1) * size_of(own)):
            dist.reduce_scatter_tensor(own, grad.contiguous(), group=group.process_group)
        return own, None


if __name__ == "__main__":
    work(int(sys.argv[1]))
