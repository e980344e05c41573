"""A plan in words: the ranked table, the best layout in detail, why it is the best, and what the numbers rest on."""

import io
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from m2_ds.plan.cluster import Cluster
from m2_ds.plan.memory import Memory
from m2_ds.plan.search import TIE, Plan, Planner, Prediction
from m2_ds.plan.time import SEPARATE
from m2_ds.plan.weights import weights_of
from m2_ds.plan.work import tokens_of

DAY = 86400.0
_SENTENCES = 3  # of runners-up, and of what does not fit


def days(prediction: Prediction, pairs: float) -> float:
    c = prediction.candidate
    return math.ceil(pairs / (c.data * c.accumulation * c.micro_batch)) * prediction.time.total / DAY


def samples_per_s(prediction: Prediction) -> float:
    c = prediction.candidate
    return c.data * c.accumulation * c.micro_batch / prediction.time.total


def mfu(prediction: Prediction, planner: Planner) -> float | None:
    peak = planner.cluster.peak_tflops.get(planner.config.engine.precision)
    return None if peak is None else prediction.time.tflops() / peak


def basis(planner: Planner) -> list[str]:
    """What is measured, what is extrapolated, and from what."""
    cluster, config = planner.cluster, planner.config
    lines = [
        "counted: bytes by kind of traffic (the log's sent_mb), operations; by formula: memory, compared with peaks "
        "measured on CPU ranks (docs/planning.md)"
    ]
    if config.loss.vl_weight == 0:
        lines.append("an upper bound: loss.vl_weight is 0, and a backward of the vision-language layers is counted")
    if config.loss.cmim.visual_tokenizer is not None and config.loss.cmim.weight > 0:
        lines.append("not counted: time and memory of the visual tokenizer, which the planner does not know")
    if cluster.basis == "data sheet":
        lines.append(
            f"extrapolated: every second, days and MFU, from data sheets of {cluster.name}; memory of GPUs, which no "
            "run has confirmed"
        )
        return [*lines, *(f"assumed: {note}" for note in cluster.notes)]
    speeds = cluster.for_precision(config.engine.precision)
    widths = f"{speeds.products[0].width} to {speeds.products[-1].width}"
    lines.append(f"measured: speeds of {cluster.name}, {cluster.ranks_per_node} rank(s), widths {widths}")
    if not speeds.covers(config.model.hidden_size):
        lines.append(f"extrapolated: width {config.model.hidden_size} lies outside of the measured {widths}")
    lengths = [of.length for of in tokens_of(config.model, planner.load, 1, planner.on_cpu)]
    longest, measured = sum(lengths) if config.loss.masked else max(lengths), speeds.attention[-1].length
    if longest > measured:
        lines.append(f"extrapolated: attention over {longest} tokens as fast as over the measured {measured}")
    if cluster.nodes > 1:
        lines.append("extrapolated: several nodes; links between them are as the cluster's file says")
    return [*lines, *(f"note: {note}" for note in cluster.notes)]


def as_json(plan: Plan, planner: Planner, pairs: float | None) -> dict[str, Any]:
    """Everything that the report shows, and more rows of it."""
    config = planner.config
    return {
        "cluster": planner.cluster.name,
        "ranks": planner.cluster.ranks,
        "precision": config.engine.precision,
        "load": asdict(planner.load),
        "basis": basis(planner),
        "looked_at": plan.looked_at,
        "layouts": [_entry(p, planner, pairs) for p in plan.fitting],
        "too_large": [_entry(p, planner, pairs) for p in plan.too_large],
        "refused": [{"candidate": asdict(c), "reason": reason} for c, reason in plan.refused],
    }


def _entry(p: Prediction, planner: Planner, pairs: float | None) -> dict[str, Any]:
    return {
        "candidate": asdict(p.candidate),
        "contrastive_batch": p.candidate.contrastive_batch,
        "memory": [asdict(m) | {"peak": m.peak} for m in p.memory],
        "capacity": p.capacity,
        "traffic": [t.sent for t in p.traffic],
        "seconds": p.time.parts,
        "step_s": p.time.total,
        "bubble": p.time.bubble,
        "communication_share": p.time.communication / p.time.total,
        "tflops": p.time.tflops(),
        "mfu": mfu(p, planner),
        "samples_per_s": samples_per_s(p),
        "days": None if pairs is None else days(p, pairs),
    }


def text(plan: Plan, planner: Planner, pairs: float | None, width: int = 118) -> str:
    """The whole report, for a terminal or a file."""
    console = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    cluster, config, load = planner.cluster, planner.config, planner.load
    model = config.model
    whole = weights_of(config, planner.stages(1)[0], 1)
    unit, name = (1e9, "billion") if whole.all >= 1e9 else (1e6, "million")
    console.print(
        f"{whole.all / unit:.2f} {name} parameters ({whole.trained / unit:.2f} train), {config.engine.precision}; "
        f"{_counted(cluster.nodes, 'node')} of {cluster.ranks_per_node} x {cluster.name}"
    )
    console.print(
        f"{_counted(load.captions, 'caption')} a picture of up to {load.length} tokens ({load.mean_length:g} on "
        f"average), pictures of {model.image_size} px, patch_drop {model.patch_drop:g}; {plan.looked_at} ways looked at"
    )
    if not plan.fitting:
        console.print("\nNothing fits.")
    else:
        console.print(_ranking(plan.fitting, planner, pairs))
        best = plan.fitting[0]
        console.print(f"Best: {best.candidate.name}\n")
        console.print(_memory(best.memory, best.capacity))
        console.print(_traffic(best))
        console.print(_time(best))
        console.print(*why(plan), sep="\n", soft_wrap=False)
    console.print(*too_large(plan), sep="\n")
    console.print(*basis(planner), sep="\n")
    out = console.file
    assert isinstance(out, io.StringIO)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _ranking(rows: Iterable[Prediction], planner: Planner, pairs: float | None) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "tp", "pp", "dp", "ZeRO", "g", "k x b", "recompute", "batch"):
        table.add_column(name, justify="left" if name == "recompute" else "right", no_wrap=True)
    for name in ("peak GB", "step s", "bubble", "comm", "MFU", "pairs/s", "days"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, p in enumerate(rows, 1):
        c, share = p.candidate, mfu(p, planner)
        table.add_row(
            str(number), f"{c.tensor}{'s' * c.sequence}", str(c.pipeline), str(c.data),
            f"{c.stage}{'o' * (c.offload != 'none')}{'' if c.reduce_once else 'm'}", str(c.group),
            f"{c.accumulation} x {c.micro_batch}", c.recompute, str(c.contrastive_batch), gb(p.worst.peak),
            f"{p.time.total:.3g}", f"{p.time.bubble:.0%}", f"{p.time.communication / p.time.total:.0%}",
            "-" if share is None else f"{share:.0%}", f"{samples_per_s(p):,.0f}",
            "-" if pairs is None else f"{days(p, pairs):.1f}",
        )  # fmt: skip
    table.caption = (
        "tp s: sequence parallel; ZeRO o: offload, m: gradients reduced every micro-batch; g: data-parallel ranks a "
        f"contrast group; batch: pairs compared. Within {TIE:.0%} of the fastest, simpler ones come first."
    )
    return table


def _memory(stages: list[Memory], capacity: float) -> Table:
    """GB of a rank by kind, at its peak, of the stages that differ."""
    table = Table(box=None, pad_edge=False, title="Memory of a rank, GB", title_justify="left")
    kinds = list(dict.fromkeys(kind for m in stages for kind, x in m.at_peak.items() if x >= 5e6))
    table.add_column("stage")
    for kind in [*kinds, "peak", "may take"]:
        table.add_column(kind, justify="right")
    for m in stages:
        table.add_row(str(m.stage), *(gb(m.at_peak.get(kind, 0.0)) for kind in kinds), gb(m.peak), gb(capacity))
    if any(m.host for m in stages):
        table.caption = f"on the host, a rank: {gb(max(m.host for m in stages))} GB"
    return table


def _traffic(p: Prediction) -> Table:
    table = Table(box=None, pad_edge=False, title="Sent by a rank in a step", title_justify="left")
    table.add_column("kind")
    table.add_column("MB", justify="right")
    table.add_column("s", justify="right")
    stages = max(p.traffic, key=lambda t: t.total)
    for kind, size in sorted(stages.sent.items(), key=lambda item: -item[1]):
        seconds = p.time.parts.get(f"send {kind}")
        table.add_row(kind, f"{size / 1e6:,.3f}", _when(kind, seconds))
    return table


def _when(kind: str, seconds: float | None) -> str:
    if seconds is not None:
        return f"{seconds:.4f}"
    return "in the passes" if kind in SEPARATE else "behind the passes"


def _time(p: Prediction) -> Table:
    table = Table(box=None, pad_edge=False, title="Seconds of a step", title_justify="left")
    table.add_column("part")
    table.add_column("s", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in sorted(p.time.parts.items(), key=lambda item: -item[1]):
        if seconds >= 0.0005 * p.time.total:
            table.add_row(name, f"{seconds:.4f}", f"{seconds / p.time.total:.1%}")
    return table


def why(plan: Plan) -> list[str]:
    """The best against its runners-up: the parts of a step in which they differ most."""
    best, lines = plan.fitting[0], []
    limit = min(p.time.total for p in plan.fitting) * (1 + TIE)
    for number, other in enumerate(plan.fitting[1 : 1 + _SENTENCES], 2):
        slower = other.time.total / best.time.total - 1
        names = {*best.time.parts, *other.time.parts}
        apart = {name: other.time.parts.get(name, 0.0) - best.time.parts.get(name, 0.0) for name in names}
        most = sorted(apart.items(), key=lambda item: -abs(item[1]))[:3]
        parts = ", ".join(f"{name} {seconds:+.3f} s" for name, seconds in most if abs(seconds) > 1e-4)
        told = "as fast, but less simple" if other.time.total <= limit else f"{slower:.1%} slower"
        lines.append(f"why not {number} ({other.candidate.name}): {told}: {parts or 'equal parts'}")
    return lines


def too_large(plan: Plan) -> list[str]:
    """What would be faster than the best, and what it lacks; or the nearest, where nothing fits."""
    limit = plan.fitting[0].time.total if plan.fitting else math.inf
    found = [p for p in plan.too_large if p.time.total < limit]
    if not plan.fitting:
        found = sorted(plan.too_large, key=lambda p: p.worst.peak)
    lines = []
    for p in found[:_SENTENCES]:
        kinds = sorted(p.worst.at_peak.items(), key=lambda item: -item[1])[:2]
        what = ", ".join(f"{kind} {gb(size)}" for kind, size in kinds)
        line = f"does not fit ({p.candidate.name}, {p.time.total:.3g} s): "
        line += f"{gb(p.worst.peak)} GB of {gb(p.capacity)}: {what}"
        if p.host > p.host_capacity:
            line += f"; host {gb(p.host)} of {gb(p.host_capacity)} GB a rank"
        lines.append(line)
    return lines


def gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:.1f}"


def _counted(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def launch_command(cluster: Cluster, recipe: str) -> str:
    """What starts the recipe on the cluster."""
    end = f"--module m2_ds.train --config {recipe}"
    if cluster.nodes > 1:
        return f"deepspeed --hostfile hosts {end}"
    start = "OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu " if cluster.device == "cpu" else ""
    return f"{start}deepspeed --num_gpus {cluster.ranks_per_node} {end}"
