#!/usr/bin/env python
"""What accumulation costs in arithmetic: the same optimizer batch in 1 and in k micro-batches, in one process.

Steps of every variant are taken in turns, on random pictures and captions (no loader, no network), after one warm-up
each; the table gives medians. "kept" is engine.kept_graphs. Activation checkpointing stands beside it, because where
k = 1 only fits with it, k micro-batches without it cost nothing more.

    python benchmarks/accumulation.py
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import random_steps
import torch
import tyro
from tables import publish

from m2_ds.engine.setup import quiet
from m2_ds.engine.step import ContrastiveStep
from m2_ds.parallel.mesh import Mesh

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Variant:
    micro_batches: int
    kept: int = 1
    recompute: Literal["none", "full"] = "none"

    @property
    def name(self) -> str:
        parts = [f"k {self.micro_batches}"]
        if self.micro_batches > 1:
            parts.append(f"kept {self.kept}")
        if self.recompute == "full":
            parts.append("full activation checkpointing")
        return ", ".join(parts)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    batch: int = 256
    """Pairs of an optimizer step."""
    k: int = 4
    """Micro-batches."""
    rounds: int = 7
    """Counted steps of every variant."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations."""
    preset: str = "tiny"
    """Model: 48 px, patch 8, width 192, 6 + 2 layers."""
    threads: int = len(os.sched_getaffinity(0))
    """Threads of the process."""
    out: Path = HERE / "results" / "accumulation.json"
    """Results; a table of the same name ending in .md is written beside it."""


def step_of(options: Options, variant: Variant, mesh: Mesh) -> Callable[[], object]:
    """One optimizer step of a fresh model."""
    pairs = options.batch // variant.micro_batches
    model = {"preset": options.preset, "recompute": variant.recompute}
    config = random_steps.run_config(
        model, zero=1, batch=options.batch, micro_batch=pairs, kept_graphs=variant.kept, precision=options.precision
    )
    engine = random_steps.training_engine(config, mesh)
    batches = [random_steps.random_pairs(config.model, pairs, (4, 21), seed) for seed in range(variant.micro_batches)]
    step = ContrastiveStep(engine, config, mesh, languages=1)
    return lambda: step(batches)


def main(options: Options) -> None:
    quiet()
    torch.set_num_threads(options.threads)
    mesh = Mesh.start()
    k = options.k
    variants = [Variant(1), Variant(k), Variant(k, kept=2), Variant(k, kept=k), Variant(1, recompute="full")]
    steps = [step_of(options, variant, mesh) for variant in variants]
    seconds: list[list[float]] = [[] for _ in variants]
    for number in range(options.rounds + 1):
        for step, found in zip(steps, seconds):
            started = time.perf_counter()
            step()
            if number:
                found.append(time.perf_counter() - started)
    mesh.stop()
    medians = [statistics.median(found) for found in seconds]
    lines = [
        "# The cost of accumulation", "",
        f"{time.strftime('%Y-%m-%d')}, one process, {options.threads} threads, {options.precision}; {options.preset} "
        f"model, {options.batch} pairs a step; medians of {options.rounds} steps, variants in turns.", "",
        "| variant | s a step | samples/s | time over k 1 |", "|---|---|---|---|",
    ]  # fmt: skip
    for variant, median in zip(variants, medians):
        ratio = median / medians[0]
        lines.append(f"| {variant.name} | {median:.2f} | {options.batch / median:.0f} | {ratio:.2f} x |")
    content = [{**asdict(variant), "seconds": found} for variant, found in zip(variants, seconds)]
    publish(options.out, {"precision": options.precision, "variants": content}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
