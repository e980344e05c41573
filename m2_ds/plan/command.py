"""``m2 plan``: from a model, a cluster and a batch to ranked layouts, a recipe and the command that starts it."""

import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from m2_ds.config import RunConfig, load_config
from m2_ds.files import write_atomically, write_json
from m2_ds.model.config import PRESETS
from m2_ds.plan.cluster import load_cluster
from m2_ds.plan.layout import Candidate, Load
from m2_ds.plan.report import as_json, days, launch_command, text
from m2_ds.plan.search import Plan, Planner, Prediction
from m2_ds.schema import explain

RECIPES = Path("ds_configs/recipes")


def plan(
    *,
    model: str | None = None,
    recipe: Path | None = None,
    cluster: str | None = None,
    nodes: int | None = None,
    ranks: int | None = None,
    global_batch: int | None = None,
    contrastive_batch: int | None = None,
    pairs: float | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    caption_tokens: int | None = None,
    mean_caption_tokens: float | None = None,
    top: int = 10,
    as_it_is: bool = False,
    emit: Path | None = None,
    json: Path | None = None,
    measure: Path | None = None,
    clock: Literal["wall", "cpu"] = "wall",
) -> int:
    """Rank the layouts in which a model can be trained on a cluster: memory, traffic, step time and days of each.

    Nothing is proposed that the trainer would refuse. What is measured and what is extrapolated is
    told (docs/planning.md).

    Args:
        model: preset (0.4b, 1b, 10b, tiny), with the settings of ds_configs/recipes where it has a recipe there.
        recipe: a recipe of your own, instead of a preset.
        cluster: a100-80, h100, h200, or a YAML file (docs/planning.md).
        nodes: how many; by default as the cluster says.
        ranks: GPUs (or processes) a node; by default as the cluster says.
        global_batch: pairs an optimizer step; by default the recipe's.
        contrastive_batch: least pairs that are compared with each other; by default the whole global batch.
        pairs: of the whole run; gives days, and the number of steps of the recipe.
        precision: of weights and activations; by default the recipe's.
        caption_tokens: of the longest caption of a micro-batch; by default the model's largest.
        mean_caption_tokens: of the average caption; a CPU computes no padding.
        top: layouts to show.
        as_it_is: predict the recipe as it is, instead of looking for better layouts.
        emit: write the best layout's recipe to this file, and say the command that starts it.
        json: write everything to this file.
        measure: measure this machine, write its file here, and plan for it where a model or recipe is given.
        clock: of the measurement; cpu: CPU seconds of one thread a process, where other programs keep the machine busy.
    """
    if measure is not None:
        from m2_ds.plan.measure import measure_machine  # starts processes

        if cluster is not None:
            raise ValueError(f"--measure is for this machine, and --cluster {cluster} is another one; give one of them")
        write_atomically(measure, measure_machine(ranks, clock=clock).encode())
        print(f"{measure}: written; m2 plan --cluster {measure} plans with it")
        if model is None and recipe is None:
            return 0
        cluster = str(measure)
    if cluster is None:
        raise ValueError(
            "--cluster: name one (a100-80, h100, h200), a file, or measure this machine: --measure this.yaml"
        )
    there = load_cluster(cluster).with_size(nodes, ranks)
    base = _tree(model, recipe, precision)
    if global_batch is not None:
        base["global_batch"] = global_batch
    if pairs is not None:
        if not pairs > 0:
            raise ValueError(f"--pairs {pairs:g}: give a positive number, e.g. 6e9")
        base["steps"] = math.ceil(pairs / base["global_batch"])
    config = _config(base)
    planner = Planner(base, config, there, Load.of(config, caption_tokens, mean_caption_tokens))
    best: Prediction | None
    if as_it_is:
        best, told = _one(planner, pairs)
    else:
        wanted = contrastive_batch or config.global_batch
        if not 0 < wanted <= config.global_batch:
            raise ValueError(f"--contrastive-batch {wanted}: at most the global batch, {config.global_batch} pairs")
        found = planner.search(config.global_batch, wanted, top)
        best, told = (found.fitting[0] if found.fitting else None), as_json(found, planner, pairs)
        print(text(found, planner, pairs), end="")
    if json is not None:
        write_json(json, told)
    if best is None:
        print("\nAdd ranks, take a smaller micro-batch or model, or a cluster with more memory or with a host block.")
        return 1
    if emit is not None:
        _emit(planner, best, emit, pairs)
    return 0


def _tree(model: str | None, recipe: Path | None, precision: str | None) -> dict[str, Any]:
    """The recipe's fields as they were given."""
    if (model is None) == (recipe is None):
        raise ValueError("give --model PRESET or --recipe FILE, one of them")
    if model is not None and model not in PRESETS:
        raise ValueError(f"--model {model}: there is no such preset; there are {', '.join(PRESETS)}")
    path = recipe or RECIPES / f"{model}.yaml"
    if path.exists() or recipe is not None:
        load_config(path)  # complains with file and field
        tree: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    else:
        tree = {
            "folder": f"runs/{model}", "steps": 1000, "global_batch": 256, "tokenizer": "data/tokenizer",
            "model": {"preset": model}, "data": {"sources": [{"path": "data/pairs"}]},
        }  # fmt: skip
    if precision is not None:
        tree["engine"] = {**tree.get("engine", {}), "precision": precision}
    return tree


def _config(tree: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError(explain(error, "the recipe, with what was asked for", RunConfig)) from None


def _one(planner: Planner, pairs: float | None) -> tuple[Prediction, dict[str, Any]]:
    """The recipe's own layout."""
    prediction = planner.predict(Candidate.of(planner.config, planner.cluster.ranks), exactly=True)
    planner.check(prediction.candidate)
    fits = prediction.fits
    plan = Plan([prediction] if fits else [], [] if fits else [prediction], [], 1)
    print(text(plan, planner, pairs), end="")
    return prediction, as_json(plan, planner, pairs)


def _emit(planner: Planner, best: Prediction, path: Path, pairs: float | None) -> None:
    """The recipe as the trainer reads it, with the prediction on top."""
    command = launch_command(planner.cluster, str(path))
    c = best.candidate
    lasting = "" if pairs is None else f", {days(best, pairs):.1f} days for {pairs:g} pairs"
    head = [
        f"Planned by m2 plan for {planner.cluster.nodes} x {planner.cluster.ranks_per_node} {planner.cluster.name}:",
        f"  {c.name}",
        f"Predicted: {best.time.total:.3g} s a step{lasting}; {best.worst.peak / 1e9:.1f} GB a rank.",
        f"  {command}",
    ]
    tree = c.tree(planner.base)
    body = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
    write_atomically(path, ("".join(f"# {line}\n" for line in head) + body).encode())
    load_config(path)
    print(f"\n{path}: written. Set its paths, then start it:\n  {command}")
