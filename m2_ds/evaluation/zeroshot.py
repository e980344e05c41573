"""Zero-shot classification: a picture belongs to the class whose name, put into sentences, it resembles most.

Shapes: N pictures, K classes, E embedding.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.functional import normalize

from m2_ds.evaluation.embed import Model, Processor, embed_texts
from m2_ds.evaluation.retrieval import chance_in_top
from m2_ds.parallel.mesh import SOLO, Group

SHIPPED = resources.files("m2_ds.evaluation") / "classes"


@dataclass(frozen=True)
class Classes:
    """Classes in a fixed order. `names[language][class]` lists synonyms."""

    ids: list[str]
    names: dict[str, list[list[str]]]


@dataclass(frozen=True)
class ZeroShotResult:
    """Shares of N pictures, and of each class's own; a class without pictures is not in `by_class`."""

    top1: float
    top5: float
    by_class: dict[str, float]  # top-1 by class id
    pictures: int

    @property
    def mean_class(self) -> float:
        """Mean over classes of their top-1: large classes count no more than small ones."""
        return sum(self.by_class.values()) / len(self.by_class)

    def metrics(self) -> dict[str, float]:
        """Percentages."""
        return {"top1": 100 * self.top1, "top5": 100 * self.top5, "mean_class": 100 * self.mean_class}


def load_classes(source: str | Path) -> Classes:
    """Class names from a file, or a list that ships ('emoji_groups').

    JSON and YAML: `{id: {language: name or [names]}}`. CSV: a column `id` and one a language, synonyms between `|`.
    Raises ValueError that names the file and class.
    """
    path = Path(source)
    shipped = SHIPPED / f"{source}.yaml"
    if not path.suffix and shipped.is_file() and not path.exists():
        content = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    elif not path.is_file():
        raise ValueError(f"no class names at {path}: give a JSON, YAML or CSV file, or 'emoji_groups'")
    else:
        content = _read_table(path) if path.suffix == ".csv" else _read_tree(path)
    if not isinstance(content, dict) or len(content) < 2:
        raise ValueError(f"{source}: expected at least two classes as {{id: {{language: [names]}}}}")
    languages = list(dict.fromkeys(language for names in content.values() for language in _mapping(source, names)))
    names: dict[str, list[list[str]]] = {language: [] for language in languages}
    for key, by_language in content.items():
        for language in languages:
            found = by_language.get(language)
            synonyms = [found] if isinstance(found, str) else found
            if not synonyms or not all(isinstance(name, str) and name.strip() for name in synonyms):
                raise ValueError(f"{source}: class {key!r} has no name in {language!r}, which other classes have")
            names[language].append([name.strip() for name in synonyms])
    return Classes([str(key) for key in content], names)


def load_templates(language: str, path: Path | None = None) -> list[str]:
    """Prompt templates (a YAML list, each with one `{}`): ours for en and zh unless a file is given."""
    source: Any = path if path is not None else SHIPPED / f"templates_{language}.yaml"
    if not source.is_file():
        raise ValueError(
            f"no prompt templates at {source}"
            if path is not None
            else f"no templates ship for language {language!r}: name a file in `templates`"
        )
    found = yaml.safe_load(source.read_text(encoding="utf-8"))
    if not isinstance(found, list) or not found or not all(isinstance(t, str) and t.count("{}") == 1 for t in found):
        raise ValueError(f"{source}: expected a list of sentences that each hold {{}} once")
    return found


def class_features(
    model: Model,
    processor: Processor,
    names: Sequence[Sequence[str]],
    templates: Sequence[str],
    batch_size: int,
    device: torch.device | str,
    *,
    group: Group = SOLO,
) -> Tensor:
    """fp32 [K, E]: the mean over a class's names and the templates of their unit vectors, brought to unit length."""
    sentences = [template.replace("{}", name) for synonyms in names for name in synonyms for template in templates]
    owner = torch.tensor([row for row, synonyms in enumerate(names) for _ in range(len(synonyms) * len(templates))])
    features = embed_texts(model, processor, sentences, batch_size, device, group=group, what="class names")
    sums = torch.zeros(len(names), features.shape[1]).index_add_(0, owner, normalize(features, dim=1))
    return normalize(sums, dim=1)


def probabilities(image: Tensor, classes: Tensor, logit_scale: Tensor | float) -> Tensor:
    """softmax(exp(logit_scale) image classes^T) [N, K], as the release does; logit_scale as the model holds it."""
    scale = torch.as_tensor(logit_scale).detach().float().cpu().exp()
    return torch.softmax(scale * image.float() @ classes.float().T, dim=1)


def classify(image: Tensor, classes: Tensor, labels: Tensor, ids: Sequence[str]) -> ZeroShotResult:
    """Accuracy of image [N, E] against classes [K, E], labels int64 [N]. Equal scores share the chance."""
    scores = image.float() @ classes.float().T
    if not bool(scores.isfinite().all()):
        raise ValueError("the embeddings hold NaN or infinity: the weights they came from have diverged")
    own = scores.gather(1, labels[:, None])
    above = (scores > own).sum(1)
    tied = (scores == own).sum(1) - 1
    one = torch.ones_like(above)
    top1, top5 = (chance_in_top(above, tied, one, k) for k in (1, 5))
    by_class = {ids[label]: float(top1[labels == label].mean()) for label in labels.unique().tolist()}
    return ZeroShotResult(float(top1.mean()), float(top5.mean()), by_class, len(labels))


def labels_of(categories: Sequence[str | None], classes: Classes, where: str) -> Tensor:
    """Class numbers int64 [N] of the pictures' categories; ValueError names a category that is no class."""
    rows = {key: row for row, key in enumerate(classes.ids)}
    if unknown := sorted({str(category) for category in categories if category not in rows}):
        raise ValueError(f"{where}: categories {unknown[:5]} are not among the classes {classes.ids[:12]}")
    return torch.tensor([rows[category] for category in categories if category is not None])


def _mapping(source: str | Path, names: Any) -> dict[str, Any]:
    if not isinstance(names, dict):
        raise ValueError(f"{source}: expected {{language: [names]}} for each class, found {names!r}")
    return names


def _read_tree(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None


def _read_table(path: Path) -> dict[str, dict[str, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        if "id" not in (reader.fieldnames or ()):
            raise ValueError(f"{path}: expected a column 'id' and one a language, found {reader.fieldnames}")
        rows = list(reader)
    return {
        row["id"]: {
            language: [name for name in (text or "").split("|") if name.strip()]
            for language, text in row.items()
            if language and language != "id"
        }
        for row in rows
    }
