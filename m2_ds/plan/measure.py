"""``m2 plan --measure``: the speeds of this machine, as a cluster file.

Processes time layers of the model, their products and attention alone, AdamW with what DeepSpeed does around it, and
collectives (m2_ds.plan.measure_rank); what is in a layer beside products and attention is its pointwise work. What
engines add is found in steps of a few small models (m2_ds.plan.calibrate).
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import psutil
import torch
import yaml

from m2_ds.model.config import M2EncoderConfig
from m2_ds.plan.calibrate import LEAST_SHARE, Tree, calibrate, rounded
from m2_ds.plan.cluster import Cluster
from m2_ds.plan.measure_rank import DEPTH, HEAD, HEADS, LARGE, LENGTH, LENGTHS, SAMPLES, SMALL, WIDTHS
from m2_ds.plan.trial import Clock
from m2_ds.plan.work import BYTES, Tokens, Work, layer_work

BUDGET_S = 1.0  # of one timing


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
    reserve = json.loads(_run("reserve", 1, budget_s, clock, {"MALLOC_MMAP_THRESHOLD_": str(2**20)}))["bytes"]
    memory = psutil.virtual_memory().total / 1e9
    machine: dict[str, Any] = {
        "name": f"{socket.gethostname()}, {cores} cores",
        "basis": "measured",
        "device": "cpu",
        "nodes": 1,
        "reserve_gb": round(max(reserve, 0) / 1e9, 3),
    }
    smaller = []
    for count in sorted({1, most}):
        machine |= {"ranks_per_node": count, "memory_gb": round(memory / count, 2)}
        machine |= _speeds(_run("speeds", count, budget_s, clock), count)
        calibrate(machine, partial(_trials, count, budget_s, clock))
        if count < most:
            smaller.append({"ranks": count, "arithmetic": machine["arithmetic"]})
    tree = {
        **machine,
        "at_fewer_ranks": smaller,
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


def _run(
    what: str, ranks: int, budget_s: float, clock: Clock, more: dict[str, str] | None = None, trees: Sequence[Tree] = ()
) -> str:
    """The first rank's answer to ``what``; all ranks work at once."""
    command = [sys.executable, "-m", "m2_ds.plan.measure_rank", what, str(budget_s), clock, json.dumps(trees)]
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


def _trials(ranks: int, budget_s: float, clock: Clock, trees: list[Tree]) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads(_run("trials", ranks, budget_s, clock, trees=trees))
    return found


def _speeds(answer: str, ranks: int) -> dict[str, Any]:
    """From times to the blocks of a cluster file."""
    times = json.loads(answer)
    link = _link(times["collectives"], ranks) if ranks > 1 else {"bandwidth_gbs": 1.0, "latency_us": 50.0}
    return {"arithmetic": {p: _arithmetic(times[p], BYTES[p]) for p in BYTES}, "intra": link, "inter": dict(link)}


def _arithmetic(times: Tree, element: int) -> Tree:
    """Products and attention at their own speed; of a layer's time what they leave is pointwise work."""
    products, pointwise = [], {"forward": [0.0, 0.0], "backward": [0.0, 0.0]}
    attention = [
        {
            "length": length,
            **{
                f"{side}_tflops": rounded(factor * 4 * SAMPLES * length**2 * HEADS * HEAD / seconds[side] / 1e12)
                for side, factor in (("forward", 1), ("backward", 2))
            },
        }
        for length, seconds in ((length, times["attention"][str(length)]) for length in LENGTHS)
    ]
    (attending,) = (rates for rates in attention if rates["length"] == LENGTH)
    for width in WIDTHS:
        work = _work(width, element)
        rates = {}
        for side, factor, moved in (("forward", 1, work.pointwise), ("backward", 2, work.pointwise_backward)):
            alone = times["products"][str(width)][side]
            rates[side] = factor * work.products / alone
            layer = times["layers"][str(width)][side]
            attended = factor * work.attention[LENGTH] / attending[f"{side}_tflops"] / 1e12
            pointwise[side][0] += moved
            pointwise[side][1] += max(layer - alone - attended - times["dispatch"][side], LEAST_SHARE * layer)
        products.append({"width": width, **{f"{side}_tflops": rounded(x / 1e12) for side, x in rates.items()}})
    return {
        "products": products,
        "attention": attention,
        **{f"pointwise_{side}_gbs": rounded(moved / s / 1e9) for side, (moved, s) in pointwise.items()},
        **{f"layer_{side}_us": rounded(times["dispatch"][side] * 1e6) for side in ("forward", "backward")},
        "gradient_ns": rounded(times["gradient_s"] * 1e9),
        "update_ns": rounded(times["update_s"] * 1e9),
    }


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
        "bandwidth_gbs": rounded(fastest / 1e9),
        "latency_us": rounded(latency * 1e6),
        "shares": {name: rounded(speed / fastest) for name, speed in speeds.items()},
    }


def _work(width: int, element: int) -> Work:
    config = M2EncoderConfig(hidden_size=width, num_heads=width // HEAD, num_layers=DEPTH)
    return layer_work(config, Tokens(SAMPLES, LENGTH, SAMPLES * LENGTH), element)
