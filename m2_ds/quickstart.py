"""The README's first command: data, tokenizer, training, evaluation and the page, each step reused when it is there."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import yaml

from m2_ds import launch

RECIPES = Path("ds_configs/recipes")
CALIBRATION_STEPS = 8
# What the launcher, the first steps, checkpoints and the evaluation take of the minutes asked for.
OVERHEAD_S = 35.0


def quickstart(
    *,
    minutes: float = 5.0,
    data: Literal["emoji", "scenes"] = "emoji",
    folder: Path = Path("runs"),
    seed: int = 0,
    ranks: int | None = None,
) -> None:
    """Build the data, train a small model with the deepspeed launcher, evaluate it and write the page.

    Run again, it reuses what is there: data, tokenizer, a finished or an interrupted run of the same minutes and seed.

    Args:
        minutes: time for training and evaluation, after data and tokenizer are there. The number of steps follows from
            this machine's speed, measured first.
        data: emoji, real pictures and captions fetched from package registries; scenes, generated, no network needed.
        folder: where run folders go.
        seed: of the initial weights, the order of the data and every random decision.
        ranks: processes; by default one a GPU, or one a core.
    """
    if not RECIPES.is_dir():
        raise ValueError(f"there is no {RECIPES} here: call this from the top of a checkout of the project")
    if minutes <= 1:
        raise ValueError(f"--minutes is {minutes:g}: starting and evaluating take about one; give at least 2")
    ranks = ranks or launch.ranks_of_this_machine()
    recipe = RECIPES / f"{data}.yaml"
    _stage(1, "data", _build_data, data)
    _stage(2, "tokenizer", _train_tokenizer, data)
    run = folder / f"{data}-{minutes:g}min-seed{seed}"
    steps = _stage(3, "measure this machine", _steps, run, recipe, minutes, ranks)
    _stage(4, "train", _train, run, recipe, steps, seed, ranks)
    _stage(5, "evaluate", _evaluate, run, RECIPES / f"{data}_test.yaml")
    _say(f"look at   {(run / 'report.html').resolve()}")
    _say(f"use it    python -c \"import m2_ds; model, processor = m2_ds.load('{run}')\"")
    _say(f"train on  m2 quickstart --minutes {2 * minutes:g} --data {data}")


def _say(text: str) -> None:
    print(text, flush=True)


def _stage(number: int, name: str, function, *arguments):  # type: ignore[no-untyped-def]  # passes any result through
    _say(f"\n[{number}/5] {name}")
    start = time.monotonic()
    result = function(*arguments)
    _say(f"[{number}/5] {name}: {time.monotonic() - start:.0f} s")
    return result


def _build_data(data: str) -> None:
    out = Path("data") / data
    if data == "emoji":
        from m2_ds.data.sources import emoji

        emoji.build(out)
    else:
        from m2_ds.data.sources import scenes

        scenes.build(out)


def _train_tokenizer(data: str) -> None:
    from m2_ds.data.text import load_tokenizer
    from m2_ds.data.text_train import train

    out = Path(f"data/tokenizer-{data}")
    if (out / "tokenizer_config.json").exists():
        _say(f"{out} is there: {load_tokenizer(out).vocab_size} pieces")
    else:
        vocab_size = yaml.safe_load((RECIPES / f"{data}.yaml").read_text())["model"]["vocab_size"]
        train(out, dataset=(Path("data") / data,), vocab_size=vocab_size, quick=True)


def _steps(run: Path, recipe: Path, minutes: float, ranks: int) -> int:
    """How many steps fit; a run that has begun keeps the number it began with."""
    begun = run / "config.yaml"
    if begun.exists():
        steps = int(yaml.safe_load(begun.read_text(encoding="utf-8"))["steps"])
        _say(f"{run} has begun: {steps} steps")
        return steps
    trial = run.with_name(f".{run.name}.calibration")
    shutil.rmtree(trial, ignore_errors=True)
    settings = [f"folder={trial}", f"steps={CALIBRATION_STEPS}", "log.every=1", "optim.schedule.warmup_steps=1"]
    _launch(recipe, ranks, [*settings, "checkpoint.every=0", "evaluation.tasks=[]"])
    lines = [json.loads(line) for line in (trial / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    # The first steps allocate memory and decode pictures that later ones find decoded.
    seconds = sorted(line["step_s"] for line in lines[2:])[(len(lines) - 2) // 2]
    shutil.rmtree(trial)
    steps = max(20, int((60 * minutes - OVERHEAD_S) / seconds))
    _say(f"{seconds * 1000:.0f} ms a step: {steps} steps in {minutes:g} minutes")
    return steps


def _train(run: Path, recipe: Path, steps: int, seed: int, ranks: int) -> None:
    from m2_ds.convert.run_folder import CHECKPOINTS, checkpoint_steps

    if steps in checkpoint_steps(run / CHECKPOINTS):
        _say(f"{run} is trained: {steps} steps")
        return
    warmup = max(1, min(100, steps // 10))
    every = max(10, -(-steps // 4))
    settings = [f"folder={run}", f"steps={steps}", f"seed={seed}", f"optim.schedule.warmup_steps={warmup}"]
    _launch(recipe, ranks, [*settings, f"evaluation.every={every}", f"checkpoint.every={every}"])


def _launch(recipe: Path, ranks: int, overrides: list[str]) -> None:
    if code := launch.train(recipe, ranks, overrides):
        raise ValueError(f"training ended with exit code {code}; what it printed above says why")


def _evaluate(run: Path, recipe: Path) -> None:
    # A process of its own: it may use every core, whatever this one has set.
    done = subprocess.run([sys.executable, "-m", "m2_ds.cli", "evaluate", str(run), "--recipe", str(recipe)])
    if done.returncode:
        raise ValueError(f"evaluation ended with exit code {done.returncode}; what it printed above says why")
