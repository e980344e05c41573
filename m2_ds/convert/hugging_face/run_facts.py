"""What a run folder says about the weights of one of its checkpoints, for the model card."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from m2_ds.convert.run_folder import CHECKPOINTS, MODEL, SETTINGS, STATE
from m2_ds.data.reader import open_dataset
from m2_ds.files import sha256


@dataclass(frozen=True)
class Source:
    """A data set that a run was trained on, by what its manifest and records say where it is at hand."""

    name: str
    split: str
    rows: int | None = None
    origins: dict[str, int] = field(default_factory=dict)
    licences: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFacts:
    """``config``: the resolved one of the checkpoint. ``metrics``: percentages measured on these weights, by name."""

    step: int
    samples: int
    config: dict[str, Any]
    sources: list[Source]
    metrics: dict[str, float]


def run_facts(weights: Path) -> RunFacts | None:
    """Of a canonical folder, RUN/checkpoints/STEP/model; None where it is not in a run folder.

    Numbers that were measured on other weights of the run are left out. Raises ValueError that names a damaged file.
    """
    weights = weights.resolve()
    checkpoint = weights.parent
    if weights.name != MODEL or checkpoint.parent.name != CHECKPOINTS or not (checkpoint / STATE).is_file():
        return None
    run, state = checkpoint.parents[1], _read(checkpoint / STATE)
    config = _read(checkpoint / SETTINGS if (checkpoint / SETTINGS).is_file() else run / SETTINGS)
    digests = state.get("data") or []
    sources = [
        _source(each, digests[number] if number < len(digests) else None)
        for number, each in enumerate(config["data"]["sources"])
    ]
    return RunFacts(state["step"], state["samples"], config, sources, _metrics(run, checkpoint, state["step"]))


def _metrics(run: Path, checkpoint: Path, step: int) -> dict[str, float]:
    """Those of `m2 evaluate` come before those measured while training."""
    if (path := run / "metrics.json").is_file():
        content = _read(path)
        measured = Path(content["facts"].get("model", ""))
        if measured.name == MODEL and measured.parent.name == checkpoint.name:
            return content["metrics"]
    path = run / "evaluation" / f"{checkpoint.name}.json"
    return _read(path)["metrics"] if path.is_file() else {}


def _source(settings: dict[str, Any], digest: str | None) -> Source:
    """Counts of the data set at the configuration's path, if that is still the one that the run read."""
    folder, split = Path(settings["path"]), settings.get("split", "train")
    manifest = folder / "manifest.json"
    if digest is None or not manifest.is_file() or sha256(manifest) != digest:
        return Source(folder.name, split)
    opened = open_dataset(folder).split(split)
    licences = Counter(row["license"] for row in opened.iter(columns=["license"]))
    return Source(folder.name, split, opened.info.rows, dict(opened.info.sources), dict(licences.most_common()))


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no fields")
    return content
