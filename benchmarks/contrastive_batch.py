#!/usr/bin/env python
"""What the contrastive batch is worth, and that accumulation and grouping give it back: R@1 on emoji.

Every run sees the same pairs in the same order, in optimizer batches of the same size; what differs is which pairs are
compared with each other, and by how many ranks, groups and micro-batches.

    python benchmarks/contrastive_batch.py --recipe ds_configs/recipes/emoji.yaml
"""

import json
import os
import shutil
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from tables import publish

from m2_ds.launch import train_command

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Way:
    """``ranks`` in groups of ``group``, ``micro_batches`` of each."""

    ranks: int
    group: int
    micro_batches: int
    placement: str = "contiguous"

    def name(self, batch: int) -> str:
        kind = "global ITC" if self.group == self.ranks and self.micro_batches == 1 else "GBA"
        strided = ", strided" if self.placement == "strided" else ""
        contrastive = batch // self.ranks * self.group
        return f"{contrastive} | {kind} | {self.ranks} | {self.group}{strided} | {self.micro_batches}"


WAYS = (
    Way(2, 2, 1),
    Way(2, 2, 4),
    Way(4, 2, 1, "strided"),
    Way(2, 1, 4),
    Way(8, 1, 1),
)


@dataclass(frozen=True)
class Options:
    """What to train."""

    recipe: Path = Path("ds_configs/recipes/emoji.yaml")
    """Recipe; its evaluation gives the table's numbers."""
    steps: int = 200
    """Optimizer steps."""
    batch: int = 256
    """Pairs an optimizer step."""
    override: tuple[str, ...] = ()
    """More overrides for the recipe, ``name=value``."""
    splits: tuple[str, ...] = ("val_new_vendor", "test_new_vendor")
    """Splits of the recipe's data set to evaluate on."""
    work: Path = Path("build/contrastive_batch")
    """Folder for run folders."""
    out: Path = HERE / "results" / "contrastive_batch.json"
    """Results; a table of the same name ending in .md is written beside it."""


def train(options: Options, way: Way) -> dict[str, float]:
    """R@1 by metric name, and the last logged loss."""
    run = options.work / f"{way.ranks}-{way.group}-{way.micro_batches}-{way.placement}"
    shutil.rmtree(run, ignore_errors=True)
    overrides = [
        f"folder={run}", f"steps={options.steps}", f"global_batch={options.batch}",
        f"micro_batch={options.batch // way.ranks // way.micro_batches}",
        f"parallel.contrast_group={{size: {way.group}, placement: {way.placement}}}",
        f"evaluation.tasks.0.splits=[{', '.join(options.splits)}]", "checkpoint.every=0", "engine.threads=1",
        *options.override,
    ]  # fmt: skip
    log = run.with_suffix(".txt")
    run.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        done = subprocess.run(
            train_command(options.recipe, way.ranks, overrides), stdout=sink, stderr=subprocess.STDOUT,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"training failed; see {log}")
    (evaluation,) = (run / "evaluation").glob("*.json")
    metrics = json.loads(evaluation.read_text())["metrics"]
    found = {name: value for name, value in metrics.items() if name.endswith("/r1")}
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    return {**found, "loss": last["loss"], "contrastive_batch": last["contrastive_batch"]}


def main(options: Options) -> None:
    results = []
    for way in WAYS:
        results.append(train(options, way))
        print(way.name(options.batch), {k: round(v, 2) for k, v in results[-1].items()}, flush=True)
    lines = [
        "# What the contrastive batch is worth", "",
        f"{time.strftime('%Y-%m-%d')}; {options.recipe.name}, {options.steps} steps of {options.batch} pairs, "
        "one seed; R@1 in percent, means of both directions and languages.", "",
        "| contrastive batch | | ranks | g | k | " + " | ".join(options.splits) + " | last loss |",
        "|" + "---|" * (6 + len(options.splits)),
    ]  # fmt: skip
    for way, found in zip(WAYS, results):
        by_split = [statistics.mean(v for n, v in found.items() if f"/{split}/" in n) for split in options.splits]
        cells = " | ".join(f"{value:.1f}" for value in by_split)
        lines.append(f"| {way.name(options.batch)} | {cells} | {found['loss']:.3f} |")
    content = [{**asdict(way), **found} for way, found in zip(WAYS, results)]
    about = {"steps": options.steps, "batch": options.batch}
    publish(options.out, {**about, "runs": content}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
