#!/usr/bin/env python
"""Global, grouped and accumulated contrastive training on a network whose links are slow: 4 nodes of 2 ranks.

Real steps of a small M2-Encoder under DeepSpeed, every method with the same micro-batch, in the same processes, at
several link rates. Nodes are network namespaces (benchmarks/network.py), so this needs root:

    sudo python benchmarks/grouped_aggregation.py

Methods: "global" gathers features over all ranks with gradient (a reduce-scatter in backward) and reduces parameter
gradients after every micro-batch; "grouped" and "accumulated" are m2_ds's step with groups of g ranks and k
micro-batches; "regather" accumulates as open_clip does: all k features are gathered again, with gradient, for each
micro-batch, and parameter gradients reduced each time.

The step-time model (m2_ds/plan/step_time.py) is calibrated on the arithmetic of the unshaped run and on the network's
measured bandwidth and latency, and compared with every measured step; then it predicts clusters of A100s.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import network
import tyro
from grouped_aggregation_rank import METHODS, NODES, PAIRS, RANKS, RANKS_PER_NODE, Kind, Measured, Method
from tables import publish

HERE = Path(__file__).resolve().parent
PORT = "29611"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    rates: tuple[float, ...] = (200.0, 1000.0)
    """Link rates in Mbit/s; the unshaped network is measured first, for calibration."""
    again: bool = False
    """Measure nothing: make table and plot anew from --out."""
    steps: int = 4
    """Counted optimizer steps a method (fewer where k > 1 make them long: at least 2)."""
    out: Path = HERE / "results" / "grouped_aggregation.json"
    """Results; a table (.md) and a plot (.png) of the same name are written beside it."""


@dataclass
class Rate:
    """Everything measured at one link rate; None: unshaped."""

    mbit: float | None
    bandwidth: float  # bytes/s, of a large all-reduce over all ranks
    latency: float  # seconds a hop, of a tiny one
    methods: list[Measured] = field(default_factory=list)


def measure(mbit: float | None, steps: int) -> Rate:
    with network.nodes(NODES, mbit) as nodes:
        processes = []
        for rank in range(RANKS):
            node = nodes[rank // RANKS_PER_NODE]
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank % RANKS_PER_NODE),
                "GROUP_RANK": str(node.number), "MASTER_ADDR": nodes[0].address, "MASTER_PORT": PORT,
                "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
            }  # fmt: skip
            command = node.inside([sys.executable, str(HERE / "grouped_aggregation_rank.py"), str(steps)])
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=environment, stdout=out, text=True))
        try:
            printed, _ = processes[0].communicate(timeout=1800)
            if processes[0].returncode:
                raise ValueError(f"the ranks at {mbit} Mbit/s failed; their errors are above")
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return _rate({"mbit": mbit, **json.loads(printed.splitlines()[-1])})


def _rate(found: dict[str, Any]) -> Rate:
    methods = [Measured(Method(**m.pop("method")), **m) for m in found.pop("methods")]
    return Rate(**found, methods=methods)


def _read(path: Path) -> list[Rate]:
    return [_rate(rate) for rate in json.loads(path.read_text())["rates"]]


def _of(rate: Rate, method: Method) -> Measured:
    return next(m for m in rate.methods if m.method == method)


def calibrated(free: Rate) -> Any:
    """The work of a rank, from the unshaped run: CPU seconds of the first and the accumulated steps."""
    from m2_ds.plan.step_time import Work

    one, four = _of(free, Method("grouped", 2, 1)), _of(free, Method("grouped", 2, 4))
    # four = 4 forward_backward + 3 forward + update; one = forward_backward + update; a forward is a third of both.
    forward_backward = (four.arithmetic_s - one.arithmetic_s) / (3 + 3 / 3)
    gradients = one.bytes["gradients"] / (2 * (RANKS - 1) / RANKS)
    update = max(0.0, one.arithmetic_s - forward_backward)
    # What the regathering step takes beyond forwards and backwards: k^3 N b^2 logits.
    regather = _of(free, METHODS[-1])
    k = regather.method.micro_batches
    logits = k**3 * RANKS * PAIRS**2
    rest = regather.arithmetic_s - k * forward_backward * 4 / 3 - update
    return Work(
        micro_batch=PAIRS, matrices=4, embed_dim=128, parameters=gradients / 4, forward_s=forward_backward / 3,
        forward_backward_s=forward_backward, update_s=update, logit_s=max(0.0, rest / logits),
    )  # fmt: skip


def predicted(work: Any, rate: Rate, free: Rate, method: Method) -> Any:
    from m2_ds.plan.step_time import Fabric, Layout, step_time

    fabric = Fabric(RANKS_PER_NODE, rate.bandwidth, free.bandwidth, rate.latency, free.latency)
    return step_time(work, fabric, Layout(method.kind, RANKS, method.group, method.micro_batches, method.placement))


def table(rates: list[Rate], work: Any) -> Iterator[str]:
    free = rates[0]
    for rate in rates:
        title = "as fast as the links go" if rate.mbit is None else f"{rate.mbit:.0f} Mbit/s"
        yield f"\n## {title} ({rate.bandwidth / 1e6:.1f} MB/s measured, {rate.latency * 1e6:.0f} us a hop)\n"
        head = ["method", "B", "samples/s", "x global", "s a micro-batch", "arithmetic", "waiting"]
        head += ["MB: features", "MB: gradients", "MB: on the wire", "model samples/s", "error"]
        yield "| " + " | ".join(head) + " |\n|" + "---|" * len(head)
        base = _of(rate, METHODS[0]).samples_per_s
        for m in rate.methods:
            k = m.method.micro_batches
            batch = m.method.group * k * PAIRS
            features = sum(m.bytes.get(kind, 0) for kind in ("features", "feature gradients", "log-sum-exp", "ids"))
            model = predicted(work, rate, free, m.method)
            cells = [
                m.method.name, str(batch), f"{m.samples_per_s:.0f}", f"{m.samples_per_s / base:.2f}",
                f"{m.step_s / k:.3f}", f"{m.arithmetic_s / k:.3f}", f"{m.waiting_s / k:.3f}",
                f"{features / k / 1e6:.3f}", f"{m.bytes['gradients'] / k / 1e6:.2f}", f"{m.wire_bytes / k / 1e6:.2f}",
                f"{model.samples_per_s:.0f}", f"{100 * (model.samples_per_s / m.samples_per_s - 1):+.0f}%",
            ]  # fmt: skip
            yield "| " + " | ".join(cells) + " |"


# Node links in Gbit/s: eight 200 Gbit/s adapters, two of them, one of 100 and one of 25.
FABRICS = {"8 x 200": 1600, "2 x 200": 400, "100": 100, "25": 25}
A100_FLOPS, MFU = 312e12, 0.45
NVLINK, HOP = 240e9, (8e-6, 3e-6)  # bytes/s inside a node; seconds a hop between nodes and inside
CLUSTER = (32, 8)
MICRO_BATCHES = {"0.4b": 128, "1b": 64, "10b": 16}


def clusters() -> Iterator[str]:
    """The model's word, calibrated on data sheets: 32 nodes x 8 A100, bf16 gradients and features."""
    from m2_ds.engine.flops import StepFlops
    from m2_ds.model.config import M2EncoderConfig
    from m2_ds.plan.step_time import Fabric, Layout, Work, step_time

    nodes, per_node = CLUSTER
    ranks = nodes * per_node
    head = ["model", "b", "Gbit/s a node", "global samples/s", "arithmetic", "features", "gradients"]
    head += ["grouped only (g 8, k 1)", "GBA g 8, k 4", "GBA g 64, k 4", "GBA g 256, k 4", "accumulated gradients only"]
    yield "| " + " | ".join(head) + " |\n|" + "---|" * len(head)
    for name, pairs in MICRO_BATCHES.items():
        config = M2EncoderConfig.preset(name)
        flops = StepFlops(config)
        forward = pairs * (flops.image() + flops.text(20)) / (A100_FLOPS * MFU)
        parameters = _parameters(config)
        work = Work(
            pairs, 4, config.embed_dim, parameters, forward, 3 * forward, 0.0, feature_bytes=2, gradient_bytes=2
        )
        for label, gbit in FABRICS.items():
            fabric = Fabric(per_node, gbit * 1e9 / 8, NVLINK, *HOP)

            def step(method: Kind, g: int, k: int, fabric: Any = fabric, work: Any = work) -> Any:
                return step_time(work, fabric, Layout(method, ranks, g, k))

            base = step("global", ranks, 1)
            gain = [
                step("grouped", g, k).samples_per_s / base.samples_per_s for g, k in ((8, 1), (8, 4), (64, 4), (256, 4))
            ]
            # Four micro-batches of plain ITC whose gradients are reduced once: what accumulation alone gives.
            once = 4 * base.pairs / (4 * (base.arithmetic + base.features) + base.gradients) / base.samples_per_s
            shares = [100 * x / base.total for x in (base.arithmetic, base.features, base.gradients)]
            cells = [name, str(pairs), label, f"{base.samples_per_s:,.0f}", *(f"{s:.1f}%" for s in shares)]
            yield "| " + " | ".join([*cells, *(f"{x:.2f} x" for x in [*gain, once])]) + " |"


def _parameters(config: Any) -> int:
    import torch

    from m2_ds.model.encoder import M2Encoder

    with torch.device("meta"):
        return sum(p.numel() for p in M2Encoder(config).parameters())


def plot(rates: list[Rate], work: Any, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shaped = [rate for rate in rates if rate.mbit is not None]
    figure, axes = plt.subplots(1, len(shaped), figsize=(6.2 * len(shaped), 5), layout="constrained", squeeze=False)
    for axis, rate in zip(axes[0], shaped):
        names = [m.method.name for m in rate.methods]
        arithmetic = [m.arithmetic_s / m.method.micro_batches for m in rate.methods]
        rest = [m.step_s / m.method.micro_batches - a for m, a in zip(rate.methods, arithmetic)]
        axis.barh(names, arithmetic, color="#4878a8", label="arithmetic")
        axis.barh(names, rest, left=arithmetic, color="#e0a458", label="waiting for the network")
        model = [predicted(work, rate, rates[0], m.method) for m in rate.methods]
        points = [p.total / m.method.micro_batches for p, m in zip(model, rate.methods)]
        axis.plot(points, names, "k|", markersize=14, label="model")
        base = rate.methods[0].samples_per_s
        for place, m in enumerate(rate.methods):
            end = max(m.step_s / m.method.micro_batches, points[place])
            axis.annotate(f"  {m.samples_per_s / base:.2f} x", (end, place), va="center")
        axis.set_xlim(right=1.15 * max(m.step_s / m.method.micro_batches for m in rate.methods))
        axis.invert_yaxis()
        axis.set_xlabel("seconds a micro-batch")
        axis.set_title(f"{NODES} nodes x {RANKS_PER_NODE} ranks, links of {rate.mbit:.0f} Mbit/s")
    axes[0][0].legend(loc="center right")
    figure.savefig(path, dpi=110)


def main(options: Options) -> None:
    rates = _read(options.out) if options.again else [measure(mbit, options.steps) for mbit in (None, *options.rates)]
    work = calibrated(rates[0])
    head = (
        f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} cores for all {RANKS} ranks; {PAIRS} pairs a "
        f"micro-batch and rank, {work.parameters / 1e6:.1f} M parameters, 4 matrices of features of width 128, fp32. "
        "Seconds and megabytes are those of a rank and micro-batch; arithmetic is the CPU time of all ranks over the "
        "cores, waiting the time of the first rank in collectives, for data and for ranks that still compute."
    )
    lines = ["# Grouped aggregation on shaped links", "", head]
    lines += table(rates, work)
    lines += [
        f"\n## Predicted: {CLUSTER[0]} nodes x {CLUSTER[1]} A100\n",
        f"The same model on data sheets: {A100_FLOPS / 1e12:.0f} TFLOP/s at {100 * MFU:.0f}% MFU, "
        f"{NVLINK / 1e9:.0f} GB/s inside a node, gradients and features in bf16, nothing overlapped. Shares are of the "
        "global step; gains are over it in samples/s.\n",
    ]
    lines += clusters()
    content = {"work": asdict(work), "rates": [asdict(rate) for rate in rates]}
    publish(options.out, content, "\n".join(lines) + "\n")
    plot(rates, work, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
