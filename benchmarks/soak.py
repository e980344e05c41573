#!/usr/bin/env python
"""A day's worth of steps, checkpoints and evaluations in minutes: memory and open files of every rank stay flat.

    python benchmarks/soak.py

A 10B run of 10 s a step makes 8,640 of them a day, with a checkpoint each half hour and an evaluation each hour. The
job does as many with a model of a few thousand weights on two ranks, asynchronous checkpoints, both masked objectives
and a loader process, so that what grows by the step, by the checkpoint or by the evaluation has grown to a day's size.

oneDNN, by which a CPU computes, keeps 1,024 primitives by the shapes of their tensors, some kB each. Captions have many
lengths, and so this store fills for thousands of steps; here it holds 32, so that nothing else hides behind it.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro
import yaml
from tables import machine, publish

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Options:
    """What to run."""

    steps: int = 8640
    """Steps; a checkpoint comes every 180, an evaluation every 360."""
    ranks: int = 2
    """Processes of the job."""
    every_s: float = 2.0
    """Seconds between looks at the ranks."""
    growth_mb: float = 20.0
    """Memory that a rank may gain from the second fifth of the run to one near its end."""
    folder: Path = HERE.parent / "runs" / "soak"
    """Where data and run go."""
    out: Path = HERE / "results" / "soak.json"
    """Results; a table of the same name ending in .md is written beside it."""


@dataclass(frozen=True)
class Look:
    """At one rank (or loader process of it), at a step of the run."""

    step: int
    process: str
    memory_mb: float
    files: int
    threads: int


def recipe(options: Options) -> Path:
    """Small pictures, a tokenizer of their captions, and the run's settings; what is there is kept."""
    from m2_ds.data.sources.scenes import build
    from m2_ds.data.text_train import train

    data, tokenizer = options.folder / "scenes", options.folder / "tokenizer"
    build(data, train=400, val=40, test=0, size=32)
    if not tokenizer.exists():
        train(tokenizer, corpus=(), dataset=(data,), vocab_size=420)
    tree = {
        "folder": str(options.folder / "run"),
        "steps": options.steps,
        "global_batch": 8,
        "tokenizer": str(tokenizer),
        "model": {"preset": "test", "vocab_size": 420, "position_std": 0.02},
        "data": {"sources": [{"path": str(data), "split": "train"}], "workers": 1},
        "loss": {"cmlm": {"weight": 1.0}, "cmim": {"weight": 1.0}},
        "optim": {"lr": 1e-3, "schedule": {"warmup_steps": 10}},
        "engine": {"deepspeed": str(HERE.parent / "ds_configs" / "zero1.json"), "threads": 1},
        "checkpoint": {"every": 180, "keep": 2, "asynchronous": True},
        "log": {"every": 10},
        "evaluation": {
            "every": 360,
            "tasks": [{"kind": "retrieval", "dataset": str(data), "splits": ["val"]}],
        },
    }
    path = options.folder / "soak.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def soak(options: Options) -> list[Look]:
    """Run the job to its end, looking at its processes."""
    path = recipe(options)
    command = [sys.executable, "-m", "m2_ds.cli", "train", str(path), "--ranks", str(options.ranks)]
    looks: list[Look] = []
    with (options.folder / "output.txt").open("w") as output:
        job = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
        )
        while job.poll() is None:
            looks += look(job.pid, step_of(options.folder / "run"))
            time.sleep(options.every_s)
    if job.returncode:
        raise RuntimeError(f"exit code {job.returncode}; see {options.folder / 'output.txt'}")
    return looks


def step_of(run: Path) -> int:
    """Of the newest log line; 0 before the first."""
    log = run / "log.jsonl"
    lines = log.read_bytes().splitlines() if log.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (json.JSONDecodeError, KeyError):
        return 0


def look(pid: int, step: int) -> list[Look]:
    """At every process below the job's that holds a part of it, named by rank where it has one."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            rank = process.environ().get("RANK")
            if rank is None:
                continue
            loader = "" if "m2_ds.train" in " ".join(process.cmdline()) else ", loader"
            memory = process.memory_full_info().uss / 1e6
            found.append(Look(step, f"rank {rank}{loader}", memory, process.num_fds(), process.num_threads()))
        except (psutil.Error, OSError):
            continue
    return found


def verdict(looks: list[Look], options: Options) -> dict[str, dict[str, Any]]:
    """By process: numbers of the second fifth of the run and of one near its end, and whether they are flat.

    Medians of memory; the least of open files and threads, for a checkpoint that is being written has some of its own.
    """
    found = {}
    for process in sorted({x.process for x in looks}):
        own = [x for x in looks if x.process == process]
        parts = [[x for x in own if low < x.step / options.steps <= high] for low, high in ((0.2, 0.4), (0.75, 0.95))]
        if not all(parts):
            raise RuntimeError(f"{process} was not seen in the second fifth of the run or near its end")
        numbers = {
            name: [whole(getattr(x, name) for x in part) for part in parts]
            for name, whole in (("memory_mb", statistics.median), ("files", min), ("threads", min))
        }
        flat = numbers["memory_mb"][1] - numbers["memory_mb"][0] <= options.growth_mb
        flat = flat and all(numbers[name][1] <= numbers[name][0] for name in ("files", "threads"))
        found[process] = {**numbers, "looks": len(own), "flat": flat}
    return found


def tell(
    options: Options, about: dict[str, Any], minutes: float, looks: list[Look], found: dict[str, dict[str, Any]]
) -> None:
    """The table, and beside it what was seen."""
    lines = [
        "# A day's worth of steps",
        "",
        f"{about['cpu']}, {about['cores']} cores; {about['date']}. {options.steps:,} steps on {options.ranks} ranks in "
        f"{minutes:.0f} minutes, {options.steps // 180} checkpoints and {options.steps // 360} evaluations; memory: "
        "medians over the second fifth of the run and one near its end, files and threads: the least there.",
        "",
        "| process | memory of its own, MB | open files | threads | flat |",
        "|---|---|---|---|---|",
        *(
            f"| {process} | "
            + " | ".join(f"{x[0]:.0f} -> {x[1]:.0f}" for x in (row["memory_mb"], row["files"], row["threads"]))
            + f" | {'yes' if row['flat'] else 'no'} |"
            for process, row in found.items()
        ),
    ]
    tenths = [
        asdict(of[len(of) // 2])  # one in the middle
        for process in found
        for tenth in range(10)
        if (of := [x for x in looks if x.process == process and tenth <= 10 * x.step / options.steps < tenth + 1])
    ]
    content = {"about": about, "minutes": minutes, "found": found, "looks": tenths}
    publish(options.out, content, "\n".join(lines) + "\n")


def main(options: Options) -> None:
    started = time.monotonic()
    looks = soak(options)
    minutes = (time.monotonic() - started) / 60
    found = verdict(looks, options)
    about = machine("torch", "deepspeed")
    tell(options, about, minutes, looks, found)
    if not all(row["flat"] for row in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
