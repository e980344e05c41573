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

from m2_ds.evaluation.bench import Bench, View, reader, where
from m2_ds.evaluation.cache import Cache
from m2_ds.evaluation.class_names import load_classes, load_templates
from m2_ds.evaluation.config import EvaluationConfig, HardNegativesTask, HiddenWordsTask, RetrievalTask, ZeroShotTask
from m2_ds.evaluation.embed import Model, Processor
from m2_ds.evaluation.gallery import gallery
from m2_ds.evaluation.probes import ProbePairs, ProbeResult, judge, probe, probe_pairs
from m2_ds.evaluation.rebuilding import rebuilding
from m2_ds.evaluation.release import Listed, release_recall
from m2_ds.evaluation.sources import FolderSource, ListSource
from m2_ds.evaluation.zeroshot import classify, labels_of, mean_of_prompts, prompts, write_predictions
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
        return "/".join((self.task, self.split, self.language, *([] if self.kind == "retrieval" else [self.metric])))

    @property
    def metric(self) -> str:
        """What stands for the kind of measurement in metrics' names; cosine is what is meant where nothing is said."""
        score = self.facts.get("score", "cosine")
        return self.kind if score == "cosine" else f"{self.kind}_by_{score}"

    def flat(self) -> dict[str, float]:
        return {f"{self.prefix}/{name}": value for name, value in self.metrics.items()}


def _retrieval(bench: Bench, task: RetrievalTask, part: str) -> list[Entry]:
    embeddings, view = bench.embeddings(task, part), bench.view(task, part)
    found = []
    for language, result in bench.retrieval(task, part).items():
        texts = embeddings.texts[language]
        metrics = result.metrics()
        facts = {
            "pictures": len(embeddings.keys),
            "captions": len(texts.text),
            "different_captions": len(texts.texts),
            "skipped": view.skipped,
            "protocol": task.protocol,
            "median_rank": {
                "image_to_text": float(result.image_to_text.rank.median()),
                "text_to_image": float(result.text_to_image.rank.median()),
            },
        }
        if task.protocol == "release":
            facts["fair"] = metrics
            listed = _listed(view, texts.texts)
            facts["captions"] = len(listed.text)
            metrics = release_recall(embeddings.image, texts.features, listed)
        found.append(Entry(task.kind, task.title, part, language, metrics, facts))
    return found


def _listed(view: View, texts: Sequence[str]) -> Listed:
    """The list as it was written, over the pictures that are there."""
    assert isinstance(view.source, ListSource)
    picture = {row: place for place, row in enumerate(view.rows)}
    number = {text: row for row, text in enumerate(texts)}
    lines = [line for line in view.source.lines if line.row in picture]
    return Listed.of(
        [picture[line.row] for line in lines], [[number[caption] for caption in line.captions] for line in lines]
    )


def _zeroshot(bench: Bench, task: ZeroShotTask, part: str) -> list[Entry]:
    view = bench.view(task, part)
    folders = sorted(set(view.source.classes)) if isinstance(view.source, FolderSource) and not task.labels else None
    classes = load_classes(task.classes, task.languages, folders)
    labels = labels_of(view.listing.categories, classes, where(task, part))
    found = []
    for language in task.languages:
        templates = load_templates(language, task.templates.get(language))
        names = classes.names[language]
        features = mean_of_prompts(bench.texts(prompts(names, templates), language), names, templates)
        result = classify(view.images, features, labels, classes.ids)
        facts = {
            "pictures": result.pictures,
            "classes": len(classes.ids),
            "templates": len(templates),
            "skipped": view.skipped,
            "protocol": task.protocol,
            "by_class": {key: 100 * value for key, value in result.by_class.items()},
            "names": {key: synonyms[0] for key, synonyms in zip(classes.ids, names)},
            "counts": dict(zip(classes.ids, torch.bincount(labels, minlength=len(classes.ids)).tolist())),
        }
        if task.predictions and bench.out is not None and bench.group.is_first:
            name = f"predictions-{task.title}-{part}-{language}.parquet"
            scale = float(bench.model.logit_scale.detach())  # type: ignore[attr-defined]  # while training `out` is None
            write_predictions(bench.out / name, view.listing.keys, view.images, features, labels, classes.ids, scale)
        found.append(Entry(task.kind, task.title, part, language, result.metrics(), facts))
    return found


def _hard_negatives(bench: Bench, task: HardNegativesTask, part: str) -> list[Entry]:
    view = bench.view(task, part)
    found = []
    for language in task.languages:
        pairs = probe_pairs(view.listing, language, task.caption_kinds)
        if not pairs.kinds:
            raise ValueError(f"{where(task, part)} has no hard negatives in {language!r}")
        if task.score == "cosine":
            result = probe(view.images, bench.texts(pairs.texts, language), pairs)
        else:
            result = _probe_by_words(bench, task, part, pairs)
        facts = {"pairs": result.count, "skipped": view.skipped, "score": task.score}
        found.append(Entry(task.kind, task.title, part, language, result.metrics(), facts))
    return found


def _probe_by_words(bench: Bench, task: HardNegativesTask, part: str, pairs: ProbePairs) -> ProbeResult:
    both = [list(zip(pairs.picture.tolist(), rows.tolist())) for rows in (pairs.true, pairs.negative)]
    place = {pair: number for number, pair in enumerate(dict.fromkeys(both[0] + both[1]))}
    asked = [(picture, pairs.texts[row]) for picture, row in place]
    scores = bench.matching(task, part).scores(asked, task.rounds, f"pairs {part}")
    true, wrong = (scores[[place[pair] for pair in some]] for some in both)
    return judge(true, wrong, pairs, len(bench.view(task, part).rows))


def _hidden_words(bench: Bench, task: HiddenWordsTask, part: str) -> list[Entry]:
    view, matching = bench.view(task, part), bench.matching(task, part)
    found = []
    for language in task.languages:
        texts, text, owner = view.listing.texts(language, task.caption_kinds)
        if not texts:
            raise ValueError(f"{where(task, part)} has no captions in {language!r} of kinds {task.caption_kinds}")
        pairs = [(picture, texts[row]) for picture, row in zip(owner.tolist(), text.tolist())]
        words, right, blind = matching.told(pairs, f"hidden words {language}").double().sum(0).tolist()
        metrics = {"accuracy": 100 * right / max(words, 1), "accuracy_blind": 100 * blind / max(words, 1)}
        facts = {"words": int(words), "captions": len(pairs), "skipped": view.skipped}
        found.append(Entry(task.kind, task.title, part, language, metrics, facts))
    return found


# Kind of task -> what carries it out. A new kind of evaluation is a class in config.py and a function here.
EVALUATORS: dict[str, Callable[[Bench, Any, str], list[Entry]]] = {
    "retrieval": _retrieval,
    "zeroshot": _zeroshot,
    "hard_negatives": _hard_negatives,
    "hidden_words": _hidden_words,
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
    group: Group = SOLO,
    cache: Cache | None = None,
) -> dict[str, Any]:
    """Every task, with details and galleries for the report.

    Returns facts (those given, and the number of parameters), seconds, metrics (flat), entries, galleries and what was
    rebuilt of hidden words and patches. With
    `out`, all of it goes to `out`/details.json, and facts and metrics alone to `out`/metrics.json. Every rank of
    `group` calls it; the first one makes galleries and writes. What is in `cache` is not embedded again.
    """
    start = time.perf_counter()
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(model, processor, config, _device(model, device), group, cache, folder)
    entries = _run(bench)
    shown: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    for task in config.tasks if galleries and group.is_first else ():
        if isinstance(task, RetrievalTask):
            for part in task.parts[: GALLERY_SPLITS - len(shown)]:
                view, results = bench.view(task, part), bench.retrieval(task, part)
                embeddings = bench.embeddings(task, part)
                made = gallery(view.source, view.rows, embeddings, results, task.title, task.match_groups, reader(task))
                shown.append(made)
                if not told:
                    told = rebuilding(
                        model, processor, view.source, view.rows, view.listing, task.languages, reader(task),
                        bench.device,
                    )  # fmt: skip
    content = {
        "facts": {**_size(model), **(facts or {})},
        "seconds": round(time.perf_counter() - start, 1),
        "metrics": {name: value for entry in entries for name, value in entry.flat().items()},
        "entries": [asdict(entry) for entry in entries],
        "galleries": shown,
        "rebuilt": told,
    }
    if folder is not None and group.is_first:
        write_json(folder / DETAILS_FILE, content)
        write_json(folder / METRICS_FILE, {"facts": content["facts"], "metrics": content["metrics"]})
    return content


def summary(content: dict[str, Any]) -> str:
    """The numbers of `evaluate` for the terminal: recalls as a table, the others in lines."""
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
    lines = lines if len(lines) > 1 else []
    for entry in content["entries"]:
        place = f"{entry['task']}/{entry['split']} {entry['language']}"
        if entry["kind"] != "retrieval":
            numbers = ", ".join(f"{name} {value:.1f}" for name, value in entry["metrics"].items())
            lines.append(f"{entry['kind']} {place}: {numbers}")
        elif entry["facts"]["protocol"] == "release":
            fair = entry["facts"]["fair"]["mean_recall"]
            lines.append(f"{place}: counted as the release counts; by the fair way the mean is {fair:.1f}")
    for place, skipped in dict.fromkeys(
        (f"{entry['task']}/{entry['split']}", len(entry["facts"]["skipped"])) for entry in content["entries"]
    ):
        if skipped:
            lines.append(f"{place}: {skipped} pictures can't be decoded and are left out; details.json names them")
    return "\n".join(lines)


def _run(bench: Bench) -> list[Entry]:
    found = []
    for task in bench.config.tasks:
        for part in task.parts:
            found += EVALUATORS[task.kind](bench, task, part)
    assert all(math.isfinite(value) for entry in found for value in entry.metrics.values())
    return found


def _size(model: Any) -> dict[str, int]:
    return {"parameters": sum(p.numel() for p in model.parameters())} if hasattr(model, "parameters") else {}


def _device(model: Any, device: torch.device | str | None) -> torch.device | str:
    return next(model.parameters()).device if device is None else device
