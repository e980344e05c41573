#!/usr/bin/env python
"""How long checkpoints hold up training: written at once, and beside training (checkpoint.asynchronous).

One job of two ranks trains a model of some 28 million numbers (weights 113 MB, a checkpoint 340 MB). In turns: steps;
a checkpoint written at once, and as many steps; one written beside training, and as many steps. The stall is what lies
between two steps, the whole ends when all is on disk and the steps are done.

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

import tables
import tyro
from checkpoints_rank import WAYS

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Options:
    """What to measure."""

    data: Path
    """Folder of a shards dataset."""
    tokenizer: Path
    """Its tokenizer."""
    turns: int = 6
    """Turns; the first, in which buffers are made, is shown apart."""
    behind: int = 4
    """Steps behind each checkpoint."""
    batch: int = 16
    """Pairs a step, over all ranks."""
    stage: int = 1
    """ZeRO stage."""
    ranks: int = 2
    """Processes."""
    out: Path = HERE / "results" / "checkpoints.json"
    """Numbers; the table is written beside it."""


def measure(options: Options, folder: Path) -> tuple[list[dict[str, Any]], int]:
    """What the ranks found, and the bytes of a checkpoint."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(options.ranks)]
    command += ["--master_port", str(29600 + os.getpid() % 300), str(HERE / "checkpoints_rank.py")]
    command += [
        str(options.turns), str(options.behind), str(HERE.parent / "ds_configs/recipes/bench_speed.yaml"),
        f"folder={folder / 'run'}", "steps=2", f"global_batch={options.batch}", f"tokenizer={options.tokenizer}",
        f"data.sources.0.path={options.data}", "optim.schedule.warmup_steps=1", "engine.threads=1",
        "model={preset: tiny, vocab_size: 16384, hidden_size: 384, num_heads: 6, embed_dim: 384}",
        f"engine.deepspeed={HERE.parent / f'ds_configs/zero{options.stage}.json'}",
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    line = next((x for x in done.stdout.splitlines() if "FOUND " in x), None)
    if line is None:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    newest = max((folder / "run/checkpoints").iterdir())
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return json.loads(line.split("FOUND ")[1]), size


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before = os.getloadavg()[0]
        found, size = measure(options, Path(folder))
        load = f"{before:.0f} before and {os.getloadavg()[0]:.0f} at the end"
    rows = []
    for way in WAYS:
        own = [one for one in found if one["way"] == way and one["turn"] > 0]
        first = next(one for one in found if one["way"] == way and one["turn"] == 0)
        cells = [_cell([one[name] for one in own]) for name in ("stall", "steps", "whole")]
        rows.append(f"| {way} | {' | '.join(cells)} | {first['stall']:.2f} |")
    about = tables.machine("torch", "deepspeed")
    stalls = {way: statistics.median(x["stall"] for x in found if x["way"] == way and x["turn"]) for way in WAYS}
    text = (
        "# What checkpoints hold up\n\n"
        f"{about['date']}, {about['cpu']}, {about['cores']} cores (load average, this job included: {load}), torch "
        f"{about['torch']}; {options.ranks} ranks of one thread, ZeRO {options.stage}, {options.batch} pairs a step, a "
        f"checkpoint of {size / 1e6:.0f} MB and {options.behind} steps behind it; {options.turns - 1} turns. Seconds: "
        "median (range).\n\n"
        "| checkpoint | stall | steps behind it | whole | stall of the first one |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"Beside training, the stall is {100 * stalls[WAYS[2]] / stalls[WAYS[1]]:.0f}% of the time that a checkpoint "
        "takes at once. The whole ends when everything is on disk and the steps are done.\n"
    )
    tables.publish(options.out, {"machine": about, "load": load, "bytes": size, "turns": found}, text)


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main(tyro.cli(Options))
