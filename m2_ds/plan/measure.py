"""``m2 plan --measure``: the speeds of this machine, as a cluster file.

Processes time layers of the model, their products and attention alone, AdamW with what DeepSpeed does around it,
collectives, and steps of very small models (m2_ds.plan.measure_rank); what is in a layer beside products and attention
is its pointwise work. The planner's own predictions are not fitted to any run that it is compared with.
"""

import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

import psutil
import torch
import yaml

from m2_ds.model.config import M2EncoderConfig
from m2_ds.plan.cluster import Cluster
from m2_ds.plan.measure_rank import DEPTH, HEAD, LARGE, LENGTH, SAMPLES, SMALL, WIDTHS
from m2_ds.plan.trial import Clock
from m2_ds.plan.work import BYTES, Tokens, layer_work

BUDGET_S = 1.0  # of one timing
LEAST_SHARE = 0.05  # of a layer's time that its pointwise work takes at least


def measure_machine(ranks: int | None = None, budget_s: float = BUDGET_S, clock: Clock = "wall") -> str:
    """The cluster file's text. ``ranks``: processes; by default one a core. A machine with GPUs is refused.

    ``clock`` cpu: seconds of work, with one thread a process; what a busy machine keeps a process waiting for is not in
    them, nor is anything else that it waits for.
    """
    if torch.cuda.is_available():
        raise ValueError(
            "--measure is for machines without a GPU: take --cluster a100-80, h100 or h200, or write a file as "
            "ds_configs/clusters has them"
        )
    cores = len(os.sched_getaffinity(0))
    most = ranks or cores
    if not 0 < most <= cores:
        raise ValueError(f"--ranks {most}: this machine has {cores} cores; more processes than cores tell nothing")
    found = {count: _speeds(_run("speeds", count, budget_s, clock), count) for count in sorted({1, most})}
    reserve = json.loads(_run("reserve", 1, budget_s, clock, {"MALLOC_MMAP_THRESHOLD_": str(2**20)}))["bytes"]
    here = found[most]
    memory = psutil.virtual_memory().total / 1e9
    link = here.get("link") or {"bandwidth_gbs": 1.0, "latency_us": 50.0}
    tree = {
        "name": f"{socket.gethostname()}, {cores} cores",
        "basis": "measured",
        "device": "cpu",
        "nodes": 1,
        "ranks_per_node": most,
        "memory_gb": round(memory / most, 2),
        "reserve_gb": round(max(reserve, 0) / 1e9, 3),
        "arithmetic": here["arithmetic"],
        "intra": link,
        "inter": dict(link),
        "at_fewer_ranks": [
            {"ranks": count, "arithmetic": speeds["arithmetic"]} for count, speeds in found.items() if count < most
        ],
        "notes": [
            f"measured {time.strftime('%Y-%m-%d')} with torch {torch.__version__} in "
            + ("CPU seconds, one thread a rank" if clock == "cpu" else f"seconds, {cores} threads over the ranks")
            + f", after a load of {os.getloadavg()[1]:.1f}",
            "memory is counted beyond what Python and the libraries hold before the model is built",
        ],
    }
    Cluster.model_validate(tree)
    return "# Written by m2 plan --measure.\n" + yaml.safe_dump(tree, sort_keys=False, width=120, allow_unicode=True)


def start_ranks(command: list[str], ranks: int, clock: Clock, more: dict[str, str]) -> list[subprocess.Popen[str]]:
    """A job of ``ranks`` processes on this machine, each with its share of the cores; the first one's output is piped.

    ``more``: into their environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = 1 if clock == "cpu" else max(1, len(os.sched_getaffinity(0)) // ranks)
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ, **more, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=environment, stdout=out, text=True))
    return processes


def _run(what: str, ranks: int, budget_s: float, clock: Clock, more: dict[str, str] | None = None) -> str:
    """The first rank's answer to ``what``; all ranks work at once."""
    command = [sys.executable, "-m", "m2_ds.plan.measure_rank", what, str(budget_s), clock]
    processes = start_ranks(command, ranks, clock, more or {})
    try:
        answer, _ = processes[0].communicate()
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise ValueError(f"measuring {what} with {ranks} process(es) failed ({codes}); the error is above")
    return answer.strip().splitlines()[-1]


def _speeds(answer: str, ranks: int) -> dict[str, Any]:
    """From times to the blocks of a cluster file."""
    times = json.loads(answer)
    found: dict[str, Any] = {"arithmetic": {p: _arithmetic(times[p], BYTES[p]) for p in BYTES}}
    if ranks > 1:
        found["link"] = _link(times["collectives"], ranks)
    return found


def _arithmetic(times: dict[str, Any], element: int) -> dict[str, Any]:
    """Products at their own speed; of a layer's time what they and attention leave is pointwise work."""
    products, pointwise, attention = [], {"forward": [0.0, 0.0], "backward": [0.0, 0.0]}, {}
    widest = _work(WIDTHS[-1], element)
    for side, factor in (("forward", 1), ("backward", 2)):
        attention[side] = factor * widest.attention / times["attention"][side]
    for width in WIDTHS:
        work = _work(width, element)
        rates = {}
        for side, factor, moved in (("forward", 1, work.pointwise), ("backward", 2, work.pointwise_backward)):
            alone = times["products"][str(width)][side]
            rates[side] = factor * work.products / alone
            layer = times["layers"][str(width)][side]
            rest = layer - alone - factor * work.attention / attention[side] - times["dispatch"][side]
            pointwise[side][0] += moved
            pointwise[side][1] += max(rest, LEAST_SHARE * layer)
        products.append({"width": width, **{f"{side}_tflops": _round(x / 1e12) for side, x in rates.items()}})
    return {
        "products": products,
        **{f"attention_{side}_tflops": _round(x / 1e12) for side, x in attention.items()},
        **{f"pointwise_{side}_gbs": _round(moved / s / 1e9) for side, (moved, s) in pointwise.items()},
        **{f"layer_{side}_us": _round(times["dispatch"][side] * 1e6) for side in ("forward", "backward")},
        "gradient_ns": _round(times["gradient_s"] * 1e9),
        "update_ns": _round(times["update_s"] * 1e9),
        "whole_update_ns": _round(times["whole_update_s"] * 1e9),
        **_overhead(times),
    }


def _overhead(times: dict[str, Any]) -> dict[str, float]:
    """Of a step and of a tensor, from steps of two very small models of other depth."""
    small, deep = times["steps"]
    dispatch = times["dispatch"]["forward"] + times["dispatch"]["backward"]
    layers = 2 * (deep["layers"] - small["layers"])
    of_tensors = deep["seconds"] - small["seconds"] - layers * dispatch
    tensor = max(of_tensors / (deep["tensors"] - small["tensors"]), 0.0)
    step = small["seconds"] - small["tensors"] * tensor - 2 * small["layers"] * dispatch
    return {"step_ms": _round(max(step, 0.0) * 1e3), "tensor_us": _round(tensor * 1e6)}


def _link(times: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Bandwidth of the fastest collective, the others' shares of it, and the latency of a hop."""
    sent = {
        "all_reduce": 2 * (ranks - 1) / ranks, "all_reduce_bf16": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1.0,
        "reduce_scatter": (ranks - 1) / ranks, "send": 2.0,
    }  # fmt: skip
    large, small = times[str(LARGE)], times[str(SMALL)]
    speeds = {name: 4 * LARGE * share / large[name] for name, share in sent.items()}
    fastest = max(speeds.values())
    hops = {"all_reduce": 2 * (ranks - 1), "all_gather": ranks - 1, "send": 2}
    latency = min(small[name] / count for name, count in hops.items())
    return {
        "bandwidth_gbs": _round(fastest / 1e9),
        "latency_us": _round(latency * 1e6),
        "shares": {name: _round(speed / fastest) for name, speed in speeds.items()},
    }


def _work(width: int, element: int) -> Any:
    config = M2EncoderConfig(hidden_size=width, num_heads=width // HEAD, num_layers=DEPTH)
    return layer_work(config, Tokens(SAMPLES, LENGTH, SAMPLES * LENGTH), element)


def _round(x: float) -> float:
    """Three digits."""
    return float(f"{x:.3g}")
