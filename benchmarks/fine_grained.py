#!/usr/bin/env python
"""What masked objectives teach: captions against twins that are wrong in one respect, at equal pairs and equal model.

    m2 data emoji data/emoji && m2 data scenes data/scenes
    m2 tokenizer train --out data/tokenizer-emoji --dataset data/emoji --vocab-size 16384 --quick
    python benchmarks/fine_grained.py

Trains ds_configs/recipes/scenes_masked.yaml and arms of it with other objectives, each with several seeds, on one core
a run (runs/fine_grained/ARM-SEED; what is finished there is not trained again), and measures them on the test split.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml
from tables import machine, publish

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "ds_configs" / "recipes" / "scenes_masked.yaml"
ITC, WHOLE = "ITC", "ITC + CMLM + CMIM"
NONE = {"weight": 0}
ARMS: dict[str, dict[str, Any]] = {
    ITC: {"cmlm": NONE, "cmim": NONE},
    "ITC + CMLM": {"cmim": NONE},
    "ITC + CMIM": {"cmlm": NONE},
    WHOLE: {},
    f"{WHOLE}, attentive": {"cmim": {"choose": "attentive"}},
}
KINDS = ("attribute", "relation", "size", "count")
LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Options:
    """What to train."""

    arms: tuple[str, ...] = tuple(ARMS)
    """Objectives."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of the arms ITC and ITC + CMLM + CMIM."""
    others: tuple[int, ...] = (1,)
    """Seeds of the other arms."""
    pictures: int = 400
    """Of the test split, the first ones."""
    jobs: int = len(os.sched_getaffinity(0))
    """Runs at a time."""
    folder: Path = HERE.parent / "runs" / "fine_grained"
    """Where runs go."""
    override: tuple[str, ...] = ()
    """Fields of the recipe, field=value, for all arms."""
    more: bool = False
    """Add to the runs that `out` holds, of the same recipe."""
    out: Path = HERE / "results" / "fine_grained.json"
    """Results; a table of the same name ending in .md is written beside it."""


def folder_of(options: Options, arm: str, seed: int) -> Path:
    return options.folder / f"{arm.lower().replace(' + ', '_').replace(', ', '_')}-{seed}"


def train(options: Options, arm: str, seed: int) -> dict[str, float]:
    """Metrics of a finished run on the test split."""
    folder = folder_of(options, arm, seed)
    tree = yaml.safe_load(RECIPE.read_text())
    tree |= {"folder": str(folder), "seed": seed}
    for name, changes in ARMS[arm].items():
        tree["loss"][name] = dict(NONE) if changes is NONE else tree["loss"][name] | changes
    tells = tree["loss"]["cmlm"]["weight"] > 0
    place = tree["data"]["sources"][0]["path"]
    common = {"dataset": place, "splits": ["test"], "limit": options.pictures}
    tree["evaluation"]["tasks"] = [
        common | {"kind": "retrieval"},
        common | {"kind": "hard_negatives"},
        *([common | {"kind": "hard_negatives", "score": "words"}, common | {"kind": "hidden_words"}] if tells else []),
    ]
    options.folder.mkdir(parents=True, exist_ok=True)
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "m2_ds.cli", "train", str(recipe), "--ranks", "1", "engine.threads=1"]
    with folder.with_suffix(".txt").open("a") as output:
        code = subprocess.run([*command, *options.override], stdout=output, stderr=output, cwd=HERE.parent).returncode
    results = sorted((folder / "evaluation").glob("step-*.json"))
    if code or not results:
        raise RuntimeError(f"{arm}, seed {seed}: exit code {code}; see {output.name}")
    print(f"{arm}, seed {seed}: done", flush=True)
    metrics: dict[str, float] = json.loads(results[-1].read_text())["metrics"]
    return metrics


def numbers(metrics: dict[str, float], score: str) -> dict[str, float]:
    """By column and language, e.g. `relation/zh`: percentages by the cosine or by words."""
    probe = "hard_negatives" if score == "cosine" else f"hard_negatives_by_{score}"
    return {
        f"{kind}/{language}": metrics[f"scenes/test/{language}/{probe}/{kind}/accuracy"]
        for kind, language in itertools.product((*KINDS, "all"), LANGUAGES)
    }


def table(options: Options, metrics: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """Rows of arms and scores: means over seeds, with the spread of what counts most."""
    lines = [
        "| objectives | seeds | recall en / zh | score | " + " | ".join(KINDS) + " | all kinds en / zh | all kinds |",
        "|---|---|---|---|" + "---|" * (len(KINDS) + 2),
    ]
    for arm, by_seed in metrics.items():
        for score in ("cosine", "words"):
            if not any("_by_words/" in name for name in next(iter(by_seed.values()))) and score == "words":
                continue
            found = [numbers(x, score) for x in by_seed.values()]
            mean = {name: statistics.mean(x[name] for x in found) for name in found[0]}
            kinds = [f"{(mean[f'{kind}/en'] + mean[f'{kind}/zh']) / 2:.1f}" for kind in KINDS]
            alls = [(x["all/en"] + x["all/zh"]) / 2 for x in found]
            spread = f" ({min(alls):.1f} to {max(alls):.1f})" if len(alls) > 1 else ""
            recall = [statistics.mean(x[f"scenes/test/{n}/mean_recall"] for x in by_seed.values()) for n in LANGUAGES]
            lines.append(
                f"| {arm} | {len(by_seed)} | {recall[0]:.1f} / {recall[1]:.1f} | {score} | {' | '.join(kinds)} | "
                f"{mean['all/en']:.1f} / {mean['all/zh']:.1f} | {statistics.mean(alls):.1f}{spread} |"
            )
    return lines


def told(metrics: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """Rows of arms with CMLM: hidden words told with the picture, and with a grey one."""
    lines = ["| objectives | words told en / zh | with a grey picture |", "|---|---|---|"]
    for arm, by_seed in metrics.items():
        name = "scenes/test/{}/hidden_words/{}"
        if name.format("en", "accuracy") not in next(iter(by_seed.values())):
            continue
        shares = [
            [statistics.mean(x[name.format(language, what)] for x in by_seed.values()) for language in LANGUAGES]
            for what in ("accuracy", "accuracy_blind")
        ]
        lines.append(f"| {arm} | " + " | ".join(f"{en:.1f} / {zh:.1f}" for en, zh in shares) + " |")
    return lines


def before(options: Options, recipe: dict[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """Metrics by arm and seed of the runs that are added to."""
    if not options.more:
        return {}
    content = json.loads(options.out.read_text())
    if content["recipe"] != recipe or content["override"] != list(options.override):
        raise SystemExit(f"{options.out} holds runs of another recipe; leave --more out, or give another --out")
    return {arm: {int(seed): found for seed, found in runs.items()} for arm, runs in content["metrics"].items()}


def main(options: Options) -> None:
    tree = yaml.safe_load(RECIPE.read_text())
    metrics = before(options, tree)
    jobs = [(arm, seed) for arm in options.arms for seed in (options.seeds if arm in (ITC, WHOLE) else options.others)]
    with ThreadPoolExecutor(options.jobs) as pool:
        for (arm, seed), found in zip(jobs, pool.map(lambda job: train(options, *job), jobs)):
            metrics.setdefault(arm, {})[seed] = found
    metrics = {arm: metrics[arm] for arm in ARMS if arm in metrics}
    about = machine("torch", "deepspeed")
    lines = [
        "# What masked objectives teach",
        "",
        f"{about['cpu']}, one core a run; {about['date']}. ds_configs/recipes/scenes_masked.yaml"
        f"{' with ' + ' '.join(options.override) if options.override else ''}: {tree['steps']:,} steps of "
        f"{tree['global_batch']} pairs for every arm, the same pairs and the same model. {options.pictures} pictures "
        "of the test split, whose scenes are in no other; a true caption against one that is wrong in the named "
        "respect (50 is guessing), means of both languages and of seeds.",
        "",
        *table(options, metrics),
        "",
        *told(metrics),
    ]
    content = {"about": about, "recipe": tree, "override": options.override, "metrics": metrics}
    publish(options.out, content, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
