#!/usr/bin/env python
"""What masked objectives cost a step: time and memory by term, in a process of its own each, in turns.

    python benchmarks/masked.py

Steps of the real engine on random pictures and captions of 4 to 20 tokens (no loader, no network), after one warm-up.
Memory is the peak of the process in the counted steps above what it held before them. The model has the release's
vocabulary, so that scores of all tokens, [batch, length, vocabulary] in fp32, would show.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tables import machine, publish

HERE = Path(__file__).resolve().parent
LENGTH = 21
TERMS: dict[str, dict[str, Any]] = {
    "ITC": {},
    "ITC + CMLM": {"cmlm": {"weight": 1.0}},
    "ITC + CMIM, random": {"cmim": {"weight": 1.0, "choose": "random"}},
    "ITC + CMIM, attentive": {"cmim": {"weight": 1.0}},
    "ITC + CMLM + CMIM, attentive": {"cmlm": {"weight": 1.0}, "cmim": {"weight": 1.0}},
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    batch: int = 128
    """Pairs of a step."""
    micro_batches: int = 2
    """In which they run."""
    vocabulary: int = 115_244
    """Rows of the token table, and scores of a hidden token."""
    steps: int = 3
    """Counted steps of a turn."""
    turns: int = 3
    """Turns of every variant."""
    threads: int = len(os.sched_getaffinity(0))
    """Threads of each process."""
    out: Path = HERE / "results" / "masked.json"
    """Results; a table of the same name ending in .md is written beside it."""


def work(options: Options, term: str) -> None:
    """One turn: seconds of each step and MB at the peak, as JSON on the last line."""
    import random_steps

    from m2_ds.engine.setup import quiet
    from m2_ds.engine.step import ContrastiveStep
    from m2_ds.parallel.mesh import Mesh
    from m2_ds.words import Words

    quiet()
    torch.set_num_threads(options.threads)
    mesh = Mesh.start()
    pairs = options.batch // options.micro_batches
    model = {"preset": "tiny", "vocab_size": options.vocabulary}
    config = random_steps.run_config(model, zero=1, batch=options.batch, micro_batch=pairs, loss=TERMS[term])
    engine = random_steps.training_engine(config, mesh)
    batches = [
        random_steps.random_pairs(config.model, pairs, (4, LENGTH), seed) for seed in range(options.micro_batches)
    ]
    ids = torch.arange(options.vocabulary)
    words = Words(begins=ids % 2 == 0, ends=ids < 0, special=ids < 5, mask_id=4)
    step = ContrastiveStep(engine, config, mesh, languages=1, words=words)
    step(batches)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        step(batches)
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds, "peak_mb": _memory("VmHWM") - before}))
    mesh.stop()


def _memory(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def main(options: Options) -> None:
    found: dict[str, list[dict[str, Any]]] = {term: [] for term in TERMS}
    for _ in range(options.turns):
        for term, turns in found.items():
            given = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items()]
            command = [sys.executable, __file__, "work", term, *given]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{term}: {done.stderr[-2000:]}")
            turns.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{term}: {statistics.median(turns[-1]['seconds']):.2f} s, {turns[-1]['peak_mb']:.0f} MB", flush=True)
    about = machine("torch", "deepspeed")
    seconds = {term: statistics.median(x for turn in turns for x in turn["seconds"]) for term, turns in found.items()}
    memory = {term: statistics.median(turn["peak_mb"] for turn in turns) for term, turns in found.items()}
    whole = options.batch / options.micro_batches * (LENGTH - 1) * options.vocabulary * 4 / 1e6
    lines = [
        "# What masked objectives cost a step",
        "",
        f"{about['cpu']}, {options.threads} threads; {about['date']}. The tiny model (192 wide, 6 + 2 layers, 48 px) "
        f"with {options.vocabulary:,} tokens, fp32, {options.batch} pairs a step in {options.micro_batches} parts, "
        f"captions of 4 to {LENGTH - 1} tokens; medians of {options.turns} turns of {options.steps} steps.",
        "",
        "| terms | s a step | times ITC | peak above what is held, MB |",
        "|---|---|---|---|",
        *(
            f"| {term} | {seconds[term]:.2f} | {seconds[term] / seconds['ITC']:.2f} | {memory[term]:.0f} |"
            for term in found
        ),
        "",
        f"Scores of all tokens of one micro-batch would be {whole:,.0f} MB, and their gradient as much again.",
    ]
    publish(options.out, {"about": about, "turns": found}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        term = sys.argv[2]
        work(tyro.cli(Options, args=sys.argv[3:]), term)
    else:
        main(tyro.cli(Options, description=__doc__))
