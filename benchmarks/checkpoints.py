#!/usr/bin/env python
"""How long checkpoints hold up training: written at once, and beside training (checkpoint.asynchronous).

Runs of a model of some 28 million numbers (weights 113 MB, a checkpoint 340 MB) on two ranks, in turns: without
checkpoints, written at once, beside training. The stall is what lies between two steps at a checkpoint, the loop the
time from the end of the first step until all is on disk.

    python benchmarks/checkpoints.py --data DATASET --tokenizer FOLDER
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tables
import tyro

HERE = Path(__file__).resolve().parent
VARIANTS = {
    "none": ["checkpoint.every=0"],
    "at once": [],
    "beside training": ["checkpoint.asynchronous=true"],
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    data: Path
    """Folder of a shards dataset."""
    tokenizer: Path
    """Its tokenizer."""
    steps: int = 12
    """Optimizer steps of a turn."""
    every: int = 4
    """Steps between checkpoints."""
    batch: int = 32
    """Pairs a step, over all ranks."""
    turns: int = 3
    """Turns of each variant."""
    stage: int = 1
    """ZeRO stage."""
    ranks: int = 2
    """Processes."""
    out: Path = HERE / "results" / "checkpoints.json"
    """Numbers; the table is written beside it."""


def turn(options: Options, variant: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(options.ranks)]
    command += ["--master_port", str(29600 + os.getpid() % 300), str(HERE / "checkpoints_rank.py")]
    command += [
        str(HERE.parent / "ds_configs/recipes/bench_speed.yaml"), f"folder={folder / 'run'}", f"steps={options.steps}",
        f"global_batch={options.batch}", f"tokenizer={options.tokenizer}", f"data.sources.0.path={options.data}",
        "model={preset: tiny, vocab_size: 16384, hidden_size: 384, num_heads: 6, embed_dim: 384}",
        "optim.schedule.warmup_steps=1", f"engine.deepspeed={HERE.parent / f'ds_configs/zero{options.stage}.json'}",
        f"checkpoint.every={options.every}", *VARIANTS[variant],
    ]  # fmt: skip
    busy = psutil.cpu_percent(2.0)
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    )
    line = next((x for x in done.stdout.splitlines() if "FOUND " in x), None)
    if line is None:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    newest = max((folder / "run/checkpoints").iterdir())
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return {**json.loads(line.split("FOUND ")[1]), "variant": variant, "bytes": size, "busy": busy / 100}


def main(options: Options) -> None:
    turns = []
    for number in range(options.turns):
        for variant in VARIANTS:
            with tempfile.TemporaryDirectory() as folder:
                turns.append(turn(options, variant, Path(folder)))
            print(number, variant, [round(x, 2) for x in turns[-1]["stalls"]], round(turns[-1]["loop"], 1), flush=True)
    publish(options, turns)


def publish(options: Options, turns: list[dict[str, Any]]) -> None:
    rows = []
    for variant in VARIANTS:
        own = [x for x in turns if x["variant"] == variant]
        # The first checkpoint of a job also makes the buffers; the end-of-run one of "none" is not counted.
        stalls = [x for one in own for x in one["stalls"][1:]] if variant != "none" else []
        steps = [x for one in own for x in one["steps"][1:]]
        firsts = [one["stalls"][0] for one in own] if variant != "none" else []
        loops = [one["loop"] for one in own]
        rows.append(
            f"| {variant} | {_median(stalls)} | {_range(stalls)} | {_median(firsts)} | {_median(steps)} | "
            f"{_median(loops)} | {_range(loops)} |"
        )
    about = tables.machine("torch", "deepspeed")
    size = max(x["bytes"] for x in turns) / 1e6
    busy = " to ".join(f"{100 * f(x['busy'] for x in turns):.0f}" for f in (min, max))
    text = (
        "# What checkpoints hold up\n\n"
        f"{about['date']}, {about['cpu']}, {about['cores']} cores, torch {about['torch']}; {options.ranks} ranks "
        f"of one thread, ZeRO {options.stage}, {options.batch} pairs a step, {options.steps} steps, a checkpoint of "
        f"{size:.0f} MB every {options.every}; {options.turns} turns of each, alternating. Others used {busy}% of "
        "the cores before turns. Medians; seconds.\n\n"
        "| checkpoints | stall | its range | first stall of a job | a step | loop | its range |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        "Loop: from the end of the first step until everything is on disk. `none` writes one, at the end.\n"
    )
    tables.publish(options.out, {"machine": about, "turns": turns}, text)


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f}" if values else ""


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else ""


if __name__ == "__main__":
    main(tyro.cli(Options))
