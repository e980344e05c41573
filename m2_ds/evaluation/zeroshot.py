"""Zero-shot classification: a picture belongs to the class whose name, put into sentences, it resembles most.

Shapes: N pictures, K classes, E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import normalize

from m2_ds.evaluation.class_names import Classes
from m2_ds.evaluation.embed import Model, Processor, embed_texts
from m2_ds.evaluation.retrieval import chance_in_top
from m2_ds.files import publish
from m2_ds.parallel.mesh import SOLO, Group

TILE = 4096  # pictures whose scores exist at a time


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


def prompts(names: Sequence[Sequence[str]], templates: Sequence[str]) -> list[str]:
    """Every name of every class in every template, class by class."""
    return [template.replace("{}", name) for synonyms in names for name in synonyms for template in templates]


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
    sentences = prompts(names, templates)
    features = embed_texts(model, processor, sentences, batch_size, device, group=group, what="class names")
    return mean_of_prompts(features, names, templates)


def mean_of_prompts(features: Tensor, names: Sequence[Sequence[str]], templates: Sequence[str]) -> Tensor:
    """fp32 [K, E] from the features of `prompts`."""
    owner = torch.tensor([row for row, synonyms in enumerate(names) for _ in range(len(synonyms) * len(templates))])
    sums = torch.zeros(len(names), features.shape[1]).index_add_(0, owner, normalize(features, dim=1))
    return normalize(sums, dim=1)


def probabilities(image: Tensor, classes: Tensor, logit_scale: Tensor | float) -> Tensor:
    """softmax(exp(logit_scale) image classes^T) [N, K], as the release does; logit_scale as the model holds it."""
    scale = torch.as_tensor(logit_scale).detach().float().cpu().exp()
    return torch.softmax(scale * image.float() @ classes.float().T, dim=1)


def classify(image: Tensor, classes: Tensor, labels: Tensor, ids: Sequence[str]) -> ZeroShotResult:
    """Accuracy of image [N, E] against classes [K, E], labels int64 [N]. Equal scores share the chance."""
    shares: list[list[Tensor]] = [[], []]
    for part, label in zip(image.float().split(TILE), labels.split(TILE)):
        scores = part @ classes.float().T
        if not bool(scores.isfinite().all()):
            raise ValueError("the embeddings hold NaN or infinity: the weights they came from have diverged")
        own = scores.gather(1, label[:, None])
        above = (scores > own).sum(1)
        tied = (scores == own).sum(1) - 1
        for share, k in zip(shares, (1, 5)):
            share.append(chance_in_top(above, tied, torch.ones_like(above), k))
    top1, top5 = map(torch.cat, shares)
    by_class = {ids[label]: float(top1[labels == label].mean()) for label in labels.unique().tolist()}
    return ZeroShotResult(float(top1.mean()), float(top5.mean()), by_class, len(labels))


def write_predictions(
    path: Path, keys: Sequence[str], image: Tensor, classes: Tensor, labels: Tensor, ids: Sequence[str], scale: float
) -> None:
    """Parquet, a row a picture: key, its class, the five likeliest classes and their `probabilities`.

    `scale`: logit_scale as the model holds it. Equal probabilities are in no order.
    """
    top, likely = [], []
    for part in image.split(TILE):
        best = probabilities(part, classes, scale).topk(min(5, len(ids)))
        top += [[ids[row] for row in rows] for rows in best.indices.tolist()]
        likely += best.values.tolist()
    columns: dict[str, Any] = {
        "key": pa.array(keys, pa.string()),
        "class": pa.array([ids[label] for label in labels.tolist()], pa.string()),
        "top5": pa.array(top, pa.list_(pa.string())),
        "probability": pa.array(likely, pa.list_(pa.float32())),
    }
    aside = path.with_name(f".{path.name}.part")
    pq.write_table(pa.table(columns), aside)
    publish(aside, path)


def labels_of(categories: Sequence[str | None], classes: Classes, where: str) -> Tensor:
    """Class numbers int64 [N] of the pictures' categories, which are ids or, all of them, numbers from 0.

    ValueError names a category that is no class.
    """
    rows = {key: row for row, key in enumerate(classes.ids)}
    if not any(category in rows for category in categories) and all(
        (category or "").isdigit() for category in categories
    ):
        rows = {str(row): row for row in range(len(classes.ids))}
    if unknown := sorted({str(category) for category in categories if category not in rows}):
        raise ValueError(f"{where}: categories {unknown[:5]} are not among the classes {classes.ids[:12]}")
    return torch.tensor([rows[category] for category in categories if category is not None])
