#!/usr/bin/env python
"""What accumulation costs in arithmetic: the same optimizer batch in 1 and in k micro-batches, in one process.

Steps of every variant are taken in turns, on random pictures and captions (no loader, no network), after one warm-up
each; the table gives medians. "kept" is engine.kept_graphs. Activation checkpointing stands beside it, because where
k = 1 only fits with it, k micro-batches without it cost nothing more.

    python benchmarks/accumulation.py
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

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


def step_of(options: Options, variant: Variant, mesh: Any) -> Callable[[], Any]:
    """One optimizer step of a fresh model."""
    import torch

    from m2_ds.config import RunConfig
    from m2_ds.data.stream import PairBatch
    from m2_ds.engine.optim import freeze_unreached
    from m2_ds.engine.setup import build_engine, deepspeed_config
    from m2_ds.engine.step import ContrastiveStep
    from m2_ds.model.encoder import M2Encoder
    from m2_ds.model.weights import init_weights

    pairs = options.batch // variant.micro_batches
    config = RunConfig.model_validate(
        {
            "folder": "unused", "steps": 10**6, "tokenizer": "unused",
            "model": {"preset": options.preset, "recompute": variant.recompute},
            "global_batch": options.batch, "micro_batch": pairs,
            "data": {"sources": [{"path": "unused", "split": "train"}]},
            "engine": {
                "deepspeed": str(HERE.parent / "ds_configs" / "zero1.json"), "kept_graphs": variant.kept,
                "precision": options.precision,
            },
        }
    )  # fmt: skip
    model = M2Encoder(config.model)
    init_weights(model, config.model, config.seed)
    freeze_unreached(model, config.loss)
    engine = build_engine(model, config, deepspeed_config(config, mesh), mesh)
    engine.train()
    g = torch.Generator().manual_seed(0)
    batches = []
    for micro in range(variant.micro_batches):
        lengths = torch.randint(4, 20, (1, pairs, 1), generator=g)
        side = config.model.image_size
        batches.append(
            PairBatch(
                images=torch.randint(0, 256, (pairs, 3, side, side), generator=g).to(torch.uint8),
                ids=torch.randint(0, config.model.vocab_size, (1, pairs, 20), generator=g),
                mask=(torch.arange(20) < lengths).long(),
                language=torch.zeros(1, pairs, dtype=torch.int64),
                group=torch.arange(pairs) + micro * pairs,
                slot=torch.arange(pairs) + micro * pairs,
                keys=[],
                skipped={},
            )
        )
    step = ContrastiveStep(engine, config, mesh, languages=1)
    return lambda: step(batches)


def main(options: Options) -> None:
    import torch

    from m2_ds.engine.setup import quiet
    from m2_ds.parallel.mesh import Mesh

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
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = [{**asdict(variant), "seconds": found} for variant, found in zip(variants, seconds)]
    options.out.write_text(json.dumps({"precision": options.precision, "variants": content}, indent=1) + "\n")
    text = "\n".join(lines) + "\n"
    options.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
