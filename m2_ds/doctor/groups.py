"""Every group of the mesh tried out: whether its collectives answer, give the right numbers, how fast, and who is slow.

A rank measures and leaves what it found; `results` puts together what all have left. Rates are those of a ring: bytes
that a rank sends, over seconds (m2_ds.parallel.traffic).
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from m2_ds.config import RunConfig
from m2_ds.doctor.check import Result, TimeLimit, rate, size, within
from m2_ds.doctor.hosts import line
from m2_ds.parallel.collectives import all_gather_rows, barrier, receive, send, start_all_reduce
from m2_ds.parallel.mesh import Group, Mesh

STEP_LIMIT_S = 60.0
KIND = "doctor"  # under which traffic counts what is sent
REPEATS = 5
SLOW_LINK, SLOW_RANK = 0.5, 0.7  # of the median of its like, under which a group, a link or a rank counts as slow
_CPU_BYTES, _GPU_BYTES = 4 << 20, 128 << 20
_WORLD, _LINKS, _NEIGHBOURS, _ARITHMETIC = "all ranks", "links between hosts", "pipeline neighbours", "arithmetic"
_REMEDY = (
    "look at the first error above; NCCL_DEBUG=INFO (or TORCH_DISTRIBUTED_DEBUG=DETAIL) tells which address it tried; "
    "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface"
)
_SLOW = "look at that link: cable, port, adapter (ethtool, ibstat), other traffic, NVLink (nvidia-smi topo -m)"


@dataclass(frozen=True)
class Measured:
    """One group, link or rank, as one rank saw it. ``speed``, of an all-reduce or a link, and ``gather``: bytes/s; of
    arithmetic ``speed`` is operations/s. ``error``: what went wrong."""

    axis: str
    what: str
    ranks: int = 1
    speed: float = 0.0
    gather: float = 0.0
    latency_s: float = 0.0
    error: str = ""


def measure(mesh: Mesh, precision: str, hosts: Sequence[int]) -> list[Measured]:
    """All of it, on every rank. ``precision``: of the arithmetic, fp32 or bf16; ``hosts``: the first rank of each.

    What hangs or fails ends the series on this rank.
    """
    axes = [(_WORLD, mesh.world), ("tensor-parallel", mesh.tensor), ("pipeline-parallel", mesh.pipeline),
            ("data-parallel", mesh.data_parallel), ("contrast", mesh.contrast)]  # fmt: skip
    steps: list[tuple[str, str, float, Callable[[], list[Measured]]]] = []
    seen: list[object] = []
    for axis, group in axes:
        if group.size > 1 and group.process_group not in seen:
            seen.append(group.process_group)
            steps.append((axis, group.name, STEP_LIMIT_S, partial(_group, axis, group, mesh)))
    if mesh.pipeline.size > 1:
        steps.append((_NEIGHBOURS, mesh.pipeline.name, STEP_LIMIT_S, lambda: list(_neighbours(mesh))))
    if len(hosts) > 1:
        steps.append((_LINKS, _WORLD, links_limit_s(len(hosts)), lambda: list(_links(mesh, hosts))))
    steps.append((_ARITHMETIC, f"rank {mesh.rank}", STEP_LIMIT_S, lambda: [_arithmetic(mesh, precision)]))
    found: list[Measured] = []
    for axis, what, limit_s, step in steps:
        try:
            found += within(limit_s, step)
        except TimeLimit:
            return [*found, Measured(axis, what, error=f"no answer within {limit_s:.0f} s")]
        except (RuntimeError, ValueError) as error:
            return [*found, Measured(axis, what, error=str(error).splitlines()[0])]
    return found


def links_limit_s(hosts: int) -> float:
    """They are tried one after another."""
    return STEP_LIMIT_S + 4.0 * hosts


def _group(axis: str, group: Group, mesh: Mesh) -> list[Measured]:
    """Right numbers first, then latency of a few bytes and rates of many."""
    _on_device(mesh)
    ones = torch.full((1024,), float(group.rank + 1), device=mesh.device)
    start_all_reduce(ones, group, KIND).wait()
    rows = all_gather_rows(torch.full((1, 4), float(group.rank), device=mesh.device), group, KIND)
    error = ""
    wanted, places = group.size * (group.size + 1) / 2, torch.arange(group.size, device=mesh.device)
    if not bool((ones == wanted).all()) or not bool((rows[:, 0] == places).all()):
        error = "a sum or gathered rows over ranks have wrong numbers"  # and the others measure on: so does this rank
    few = torch.zeros(64, device=mesh.device)
    latency = _best(lambda: start_all_reduce(few, group, KIND).wait(), mesh)
    many = torch.zeros(_bytes(mesh) // 4, device=mesh.device)
    reduced = _best(lambda: start_all_reduce(many, group, KIND).wait(), mesh)
    share = many[: len(many) // group.size]
    gathered = _best(lambda: all_gather_rows(share, group, KIND), mesh)
    n = group.size
    speed, gather = 2 * (n - 1) / n * 4 * len(many) / reduced, (n - 1) * 4 * len(share) / gathered
    return [Measured(axis, group.name, n, speed, gather, latency, error)]


def _neighbours(mesh: Mesh) -> Iterator[Measured]:
    """From every stage to the next, one pair of stages after another; told by the one that receives."""
    group = mesh.pipeline
    for stage in range(group.size - 1):
        barrier(group)
        found = _pair(mesh, group, stage, stage + 1)
        if found is not None:
            yield Measured(_NEIGHBOURS, f"stage {stage} to {stage + 1} at rank {mesh.rank}", 2, speed=found)


def _links(mesh: Mesh, hosts: Sequence[int]) -> Iterator[Measured]:
    """From the first rank of every host to that of the next, one after another: nothing else is on the network."""
    for place, rank in enumerate(hosts):
        following = hosts[(place + 1) % len(hosts)]
        barrier(mesh.world)
        found = _pair(mesh, mesh.world, rank, following)
        if found is not None:
            yield Measured(_LINKS, f"{rank} to {following}", 2, speed=found)


def _pair(mesh: Mesh, group: Group, sender: int, receiver: int) -> float | None:
    """Bytes/s from one place of a group to another, on the one that receives."""
    if group.rank not in (sender, receiver):
        return None
    _on_device(mesh)
    x = torch.zeros(_bytes(mesh) // 4, device=mesh.device)
    few = torch.zeros(1, device=mesh.device)
    times = []
    for _ in range(REPEATS):
        # The receiver asks, so that its clock runs over the transfer alone.
        if group.rank == receiver:
            send(few, sender, group, KIND)
            started = _now(mesh)
            receive(x, sender, group, KIND)
            times.append(_now(mesh) - started)
        else:
            receive(few, receiver, group, KIND)
            send(x, receiver, group, KIND)
    return x.numel() * 4 / min(times) if times else None


def _arithmetic(mesh: Mesh, precision: str) -> Measured:
    """Operations/s of a product of matrices in the run's precision, while all ranks compute."""
    _on_device(mesh)
    width = 8192 if mesh.device.type == "cuda" else 768
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.ones((width, width), dtype=dtype, device=mesh.device)
    barrier(mesh.world)
    seconds = _best(lambda: x @ x, mesh)
    return Measured(_ARITHMETIC, f"rank {mesh.rank}", speed=2 * width**3 / seconds)


def _best(work: Callable[[], object], mesh: Mesh) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        started = _now(mesh)
        work()
        times.append(_now(mesh) - started)
    return min(times)


def _now(mesh: Mesh) -> float:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    return time.perf_counter()


def _on_device(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.set_device(mesh.device)  # a thread's own setting, and steps run in threads


def _bytes(mesh: Mesh) -> int:
    return _GPU_BYTES if mesh.device.type == "cuda" else _CPU_BYTES


def as_note(found: Sequence[Measured]) -> list[dict[str, object]]:
    return [asdict(one) for one in found]


def results(found: dict[int, list[Measured]], names: dict[int, str], gradient_bytes: float) -> list[Result]:
    """One line an axis. ``found``: by rank; ``names``: what ranks are called; ``gradient_bytes``: reduced a step."""
    by_axis: dict[str, list[tuple[int, Measured]]] = defaultdict(list)
    for rank, some in sorted(found.items()):
        for one in some:
            by_axis[one.axis].append((rank, one))
    return [_axis(axis, some, names, gradient_bytes) for axis, some in by_axis.items()]


def _axis(axis: str, found: list[tuple[int, Measured]], names: dict[int, str], gradient_bytes: float) -> Result:
    if any(one.error for _, one in found):
        return _errors(axis, found, names)
    if axis == _ARITHMETIC:
        return _arithmetic_line([(rank, one.speed) for rank, one in found], names)
    by_what: dict[str, list[Measured]] = defaultdict(list)
    for _, one in found:
        by_what[one.what].append(one)
    slowest = [min(some, key=lambda m: m.speed) for some in by_what.values()]  # a group, as its slowest rank saw it
    last, usual = min(slowest, key=lambda m: m.speed), statistics.median(m.speed for m in slowest)
    name = _told(axis, last.what, names)
    if axis in (_LINKS, _NEIGHBOURS):
        shown = f"{len(slowest)} link(s), {rate(usual)} each; slowest {name} {rate(last.speed)}"
    else:
        shown = (
            f"{len(slowest)} group(s) of {last.ranks}: all-reduce {rate(last.speed)}, all-gather "
            f"{rate(min(m.gather for m in slowest))} a rank, {max(m.latency_s for m in slowest) * 1e6:.0f} us"
        )
        if axis in (_WORLD, "data-parallel") and gradient_bytes:
            seconds = 2 * (last.ranks - 1) / last.ranks * gradient_bytes / last.speed
            shown += f"; gradients of a step ({size(gradient_bytes)}) take about {seconds:.2g} s"
    if last.speed < SLOW_LINK * usual:
        shown += f"; {name} has {last.speed / usual:.0%} of the usual rate"
        return line("network", axis, "warn", shown, _SLOW)
    return line("network", axis, "ok", shown)


def _errors(axis: str, found: list[tuple[int, Measured]], names: dict[int, str]) -> Result:
    """One error that many ranks met with is told once."""
    told: dict[str, list[str]] = defaultdict(list)
    for rank, one in found:
        if one.error:
            told[f"{one.what}: {one.error}"].append(names.get(rank, f"rank {rank}"))
    shown = [f"{error} (seen by {', '.join(ranks[:8])})" for error, ranks in told.items()]
    return line("network", axis, "fail", "; ".join(shown[:4]), _REMEDY)


def _told(axis: str, what: str, names: dict[int, str]) -> str:
    if axis != _LINKS:
        return what
    sender, _, receiver = what.partition(" to ")
    return f"{names.get(int(sender), sender)} to {names.get(int(receiver), receiver)}"


def _arithmetic_line(found: list[tuple[int, float]], names: dict[int, str]) -> Result:
    rank, last = min(found, key=lambda item: item[1])
    usual = statistics.median(speed for _, speed in found)
    name = names.get(rank, f"rank {rank}")
    shown = f"{usual / 1e9:,.0f} GFLOP/s a rank; slowest {name} with {last / 1e9:,.0f}"
    if last < SLOW_RANK * usual:
        return line(
            "ranks", _ARITHMETIC, "warn", f"{shown}, {last / usual:.0%} of the usual",
            "every step waits for the slowest rank: look at what else runs there, at its temperature and power limit "
            "(nvidia-smi -q -d PERFORMANCE), or leave the host out",
        )  # fmt: skip
    return line("ranks", _ARITHMETIC, "ok", shown)


def gradients(config: RunConfig, trained: int) -> float:
    """Bytes of gradients that data-parallel ranks reduce a step, of one model's shares together."""
    cut = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    return trained * (2 if config.engine.precision == "bf16" else 4) / cut
