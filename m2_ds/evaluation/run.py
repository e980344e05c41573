"""All evaluations of a configuration: each picture and text is embedded once, whatever the number of tasks.

`run_evaluations` gives numbers while training; `evaluate` writes numbers, details and galleries for the report.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2_ds.data.shards import Split, open_dataset
from m2_ds.evaluation.config import EvaluationConfig, HardNegativesTask, RetrievalTask, ZeroShotTask
from m2_ds.evaluation.embed import (
    Embeddings,
    Listing,
    Model,
    Processor,
    TextEmbeddings,
    embed_images,
    embed_texts,
    list_split,
)
from m2_ds.evaluation.gallery import gallery
from m2_ds.evaluation.probes import probe, probe_pairs
from m2_ds.evaluation.retrieval import RetrievalResult, retrieval
from m2_ds.evaluation.zeroshot import class_features, classify, labels_of, load_classes, load_templates
from m2_ds.files import write_json
from m2_ds.parallel.mesh import SOLO, Group

DETAILS_FILE, METRICS_FILE = "details.json", "metrics.json"
GALLERY_SPLITS = 6


@dataclass(frozen=True)
class Entry:
    """One kind of measurement of one split in one language. `metrics` are percentages under short names."""

    kind: str
    task: str
    split: str
    language: str
    metrics: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        return "/".join((self.task, self.split, self.language, *([] if self.kind == "retrieval" else [self.kind])))

    def flat(self) -> dict[str, float]:
        return {f"{self.prefix}/{name}": value for name, value in self.metrics.items()}


class Bench:
    """A model on the bench: embeds what tasks ask for and remembers it."""

    def __init__(
        self, model: Model, processor: Processor, config: EvaluationConfig, device: torch.device | str, group: Group
    ) -> None:
        self.model, self.processor, self.config, self.device, self.group = model, processor, config, device, group
        self._splits: dict[tuple[Path, str], Split] = {}
        self._listings: dict[tuple[Path, str, int | None], Listing] = {}
        self._images: dict[tuple[Path, str, int | None], Tensor] = {}
        self._texts: dict[str, dict[str, Tensor]] = {}
        self._retrieved: dict[tuple[str, str], dict[str, RetrievalResult]] = {}

    def split(self, task: Any, name: str) -> Split:
        place = (task.dataset, name)
        if place not in self._splits:
            self._splits[place] = open_dataset(task.dataset).split(name)
        return self._splits[place]

    def listing(self, task: Any, name: str) -> Listing:
        place = (task.dataset, name, task.limit)
        if place not in self._listings:
            self._listings[place] = list_split(self.split(task, name), task.limit)
        return self._listings[place]

    def images(self, task: Any, name: str) -> Tensor:
        """fp32 [N, E]."""
        place = (task.dataset, name, task.limit)
        if place not in self._images:
            count = len(self.listing(task, name).keys)
            self._images[place] = embed_images(
                self.model,
                self.processor,
                self.split(task, name),
                count,
                self.config.batch_size,
                self.device,
                threads=self.config.threads,
                group=self.group,
            )
        return self._images[place]

    def texts(self, texts: Sequence[str], language: str) -> Tensor:
        """fp32 [len(texts), E]."""
        known = self._texts.setdefault(language, {})
        if fresh := [text for text in dict.fromkeys(texts) if text not in known]:
            features = embed_texts(
                self.model,
                self.processor,
                fresh,
                self.config.batch_size,
                self.device,
                group=self.group,
                what=f"texts {language}",
            )
            known.update(zip(fresh, features))
        return torch.stack([known[text] for text in texts])

    def embeddings(self, task: RetrievalTask, name: str) -> Embeddings:
        listing = self.listing(task, name)
        texts = {}
        for language in task.languages:
            different, text, owner = listing.texts(language, task.caption_kinds)
            if not different:
                raise ValueError(f"{_where(task, name)} has no captions in {language!r} of kinds {task.caption_kinds}")
            texts[language] = TextEmbeddings(different, self.texts(different, language), text, owner)
        return Embeddings(self.images(task, name), listing.keys, listing.groups, listing.categories, texts)

    def retrieval(self, task: RetrievalTask, name: str) -> dict[str, RetrievalResult]:
        """By language."""
        place = (task.title, name)
        if place not in self._retrieved:
            embeddings = self.embeddings(task, name)
            groups = embeddings.groups if task.match_groups else None
            self._retrieved[place] = {
                language: retrieval(embeddings.image, texts, groups, device=self.device)
                for language, texts in embeddings.texts.items()
            }
        return self._retrieved[place]


def _retrieval(bench: Bench, task: RetrievalTask, name: str) -> list[Entry]:
    embeddings = bench.embeddings(task, name)
    found = []
    for language, result in bench.retrieval(task, name).items():
        texts = embeddings.texts[language]
        facts = {
            "pictures": len(embeddings.keys),
            "captions": len(texts.text),
            "different_captions": len(texts.texts),
            "median_rank": {
                "image_to_text": float(result.image_to_text.rank.median()),
                "text_to_image": float(result.text_to_image.rank.median()),
            },
        }
        found.append(Entry(task.kind, task.title, name, language, result.metrics(), facts))
    return found


def _zeroshot(bench: Bench, task: ZeroShotTask, name: str) -> list[Entry]:
    classes = load_classes(task.classes)
    labels = labels_of(bench.listing(task, name).categories, classes, _where(task, name))
    found = []
    for language in task.languages:
        if language not in classes.names:
            raise ValueError(f"{task.classes} has no class names in {language!r}; it has {list(classes.names)}")
        templates = load_templates(language, task.templates.get(language))
        features = class_features(
            bench.model,
            bench.processor,
            classes.names[language],
            templates,
            bench.config.batch_size,
            bench.device,
            group=bench.group,
        )
        result = classify(bench.images(task, name), features, labels, classes.ids)
        names = {key: found[0] for key, found in zip(classes.ids, classes.names[language])}
        facts = {
            "pictures": result.pictures,
            "classes": len(classes.ids),
            "templates": len(templates),
            "by_class": {key: 100 * value for key, value in result.by_class.items()},
            "names": names,
            "counts": {key: int((labels == row).sum()) for row, key in enumerate(classes.ids)},
        }
        found.append(Entry(task.kind, task.title, name, language, result.metrics(), facts))
    return found


def _hard_negatives(bench: Bench, task: HardNegativesTask, name: str) -> list[Entry]:
    found = []
    for language in task.languages:
        pairs = probe_pairs(bench.listing(task, name), language, task.caption_kinds)
        if not pairs.kinds:
            raise ValueError(f"{_where(task, name)} has no hard negatives in {language!r}")
        result = probe(bench.images(task, name), bench.texts(pairs.texts, language), pairs)
        found.append(Entry(task.kind, task.title, name, language, result.metrics(), {"pairs": result.count}))
    return found


# Kind of task -> what carries it out. A new kind of evaluation is a class in config.py and a function here.
EVALUATORS: dict[str, Callable[[Bench, Any, str], list[Entry]]] = {
    "retrieval": _retrieval,
    "zeroshot": _zeroshot,
    "hard_negatives": _hard_negatives,
}


def run_evaluations(
    model: Model,
    processor: Processor,
    config: EvaluationConfig,
    *,
    device: torch.device | str | None = None,
    group: Group = SOLO,
) -> dict[str, float]:
    """Every task of the configuration: flat metrics, percentages, such as `emoji/test_3d/en/text_to_image/r1`.

    Every rank of `group` calls it, embeds its share, and gets the same numbers. The model is used as it is: put it in
    evaluation mode before. Raises ValueError that says what a data set or file lacks.
    """
    entries = _run(Bench(model, processor, config, _device(model, device), group))
    return {name: value for entry in entries for name, value in entry.flat().items()}


def evaluate(
    model: Model,
    processor: Processor,
    config: EvaluationConfig,
    out: Path | str | None = None,
    *,
    facts: dict[str, Any] | None = None,
    galleries: bool = True,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Every task, with details and galleries for the report.

    Returns facts (those given, and the number of parameters), seconds, metrics (flat), entries and galleries. With
    `out`, all of it goes to `out`/details.json, and facts and metrics alone to `out`/metrics.json.
    """
    start = time.perf_counter()
    bench = Bench(model, processor, config, _device(model, device), SOLO)
    entries = _run(bench)
    shown: list[dict[str, Any]] = []
    for task in config.tasks:
        if galleries and isinstance(task, RetrievalTask):
            for name in task.splits[: GALLERY_SPLITS - len(shown)]:
                embeddings, results = bench.embeddings(task, name), bench.retrieval(task, name)
                shown.append(gallery(bench.split(task, name), embeddings, results, task.title, task.match_groups))
    content = {
        "facts": {**_size(model), **(facts or {})},
        "seconds": round(time.perf_counter() - start, 1),
        "metrics": {name: value for entry in entries for name, value in entry.flat().items()},
        "entries": [asdict(entry) for entry in entries],
        "galleries": shown,
    }
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DETAILS_FILE, content)
        write_json(folder / METRICS_FILE, {"facts": content["facts"], "metrics": content["metrics"]})
    return content


def summary(content: dict[str, Any]) -> str:
    """The recalls of `evaluate` as a table for the terminal."""
    rows = [("split", "language", "image -> text R@1/5/10", "text -> image R@1/5/10", "mean")]
    for entry in content["entries"]:
        if entry["kind"] == "retrieval":
            numbers = entry["metrics"]
            cells = [
                " / ".join(f"{numbers[f'{direction}/r{k}']:5.1f}" for k in (1, 5, 10))
                for direction in ("image_to_text", "text_to_image")
            ]
            rows.append(
                (f"{entry['task']}/{entry['split']}", entry["language"], *cells, f"{numbers['mean_recall']:.1f}")
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    for entry in content["entries"]:
        if entry["kind"] != "retrieval":
            numbers = ", ".join(f"{name} {value:.1f}" for name, value in entry["metrics"].items())
            lines.append(f"{entry['kind']} {entry['task']}/{entry['split']} {entry['language']}: {numbers}")
    return "\n".join(lines)


def _run(bench: Bench) -> list[Entry]:
    found = []
    for task in bench.config.tasks:
        for name in task.splits:
            found += EVALUATORS[task.kind](bench, task, name)
    assert all(math.isfinite(value) for entry in found for value in entry.metrics.values())
    return found


def _where(task: Any, name: str) -> str:
    return f"split {name!r} of {task.dataset}"


def _size(model: Any) -> dict[str, int]:
    return {"parameters": sum(p.numel() for p in model.parameters())} if hasattr(model, "parameters") else {}


def _device(model: Any, device: torch.device | str | None) -> torch.device | str:
    return next(model.parameters()).device if device is None else device
