"""The page of a run: one HTML file that needs nothing else, made from what the run folder holds.

Every part is left out when its file is not there: curves need log.jsonl, tables and galleries details.json (written by
`m2_ds.evaluation.run.evaluate`), recall over steps evaluation/step-*.json, facts config.yaml and environment.json.
"""

import datetime
import json
import logging
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from m2_ds.evaluation.plots import Series, chart
from m2_ds.evaluation.run import DETAILS_FILE
from m2_ds.files import write_atomically

REPORT_FILE = "report.html"
PICTURE_BYTES = 4_500_000  # thumbnails in a page, so that it stays below 6 MB
LANGUAGES = {
    "en": "English",
    "zh": "中文",
    "ja": "日本語",
    "ko": "한국어",
    "de": "Deutsch",
    "fr": "Français",
    "es": "Español",
}

log = logging.getLogger(__name__)


def write_report(run_dir: Path | str, out: Path | None = None) -> Path:
    """Write `run_dir`/report.html (or `out`) and return its path.

    Raises ValueError when the folder holds nothing to show, or a file in it is damaged.
    """
    run_dir = Path(run_dir)
    steps, details = _read_log(run_dir / "log.jsonl"), _read_json(run_dir / DETAILS_FILE)
    evaluations = _read_evaluations(run_dir / "evaluation")
    if not (steps or details or evaluations):
        raise ValueError(f"{run_dir} holds no log.jsonl, no {DETAILS_FILE} and no evaluation/: nothing to report on")
    config = _read_yaml(run_dir / "config.yaml") or {}
    environment = _read_json(run_dir / "environment.json") or {}
    details = details or {}
    languages = _languages(details, evaluations, config)
    colours = {language: place for place, language in enumerate(languages)}
    galleries, dropped = _affordable(details.get("galleries", []))
    page = (
        _templates()
        .get_template("report.html.j2")
        .render(
            title=run_dir.resolve().name,
            written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            languages=languages,
            names={language: LANGUAGES.get(language, language) for language in languages},
            colours=colours,
            lead=_lead(config, environment, steps, details),
            tiles=_tiles(details, steps),
            headline=_headline(details, languages),
            charts=_charts(steps, evaluations, colours),
            retrieval=[entry for entry in details.get("entries", []) if entry["kind"] == "retrieval"],
            zeroshot=_pair_languages(details, "zeroshot"),
            probes=_pair_languages(details, "hard_negatives"),
            told=_pair_languages(details, "hidden_words"),
            rebuilt=details.get("rebuilt", []),
            galleries=galleries,
            dropped=dropped,
            facts=_facts(config, environment, details),
            config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
            environment=yaml.safe_dump(environment, sort_keys=False, allow_unicode=True) if environment else "",
        )
    )
    path = out or run_dir / REPORT_FILE
    write_atomically(path, page.encode())
    return path


def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("m2_ds.evaluation"),
        autoescape=select_autoescape(default_for_string=True, default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda value: f"{value:,}"
    environment.filters["one"] = lambda value: f"{value:.1f}"
    environment.filters["shown_classes"] = _shown_classes
    environment.filters["about"] = _about
    environment.filters["split_name"] = lambda value: value.replace("_", " ")
    return environment


# -- what the run folder holds ---------------------------------------------------------------------------------------


def _read_log(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, KeyError, TypeError):
            log.warning("%s, line %d is no log entry (cut short by a crash?): left out", path, number)
    return lines


def _read_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or evaluate again") from None


def _read_yaml(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Evaluations while training, by step."""
    found = [_read_json(path) for path in folder.glob("step-*.json")] if folder.is_dir() else []
    return sorted((each for each in found if each.get("metrics")), key=lambda each: each["step"])


# -- what the page shows ---------------------------------------------------------------------------------------------


def _languages(details: dict[str, Any], evaluations: list[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    found = [entry["language"] for entry in details.get("entries", [])]
    found += [name.split("/")[2] for each in evaluations for name in each["metrics"] if name.count("/") >= 3]
    found += list(config.get("data", {}).get("languages", []))
    return list(dict.fromkeys(found))


def _seconds(steps: list[dict[str, Any]]) -> float:
    """Time in steps: a line's mean step time counts for the steps since the line before."""
    total, last = 0.0, 0
    for line in steps:
        total += (line["step"] - last) * (line.get("step_s") or 0.0)
        last = line["step"]
    return total


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _count(number: float) -> str:
    for limit, unit in ((1e9, " billion"), (1e6, " million")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:,.0f}"


def _lead(
    config: dict[str, Any], environment: dict[str, Any], steps: list[dict[str, Any]], details: dict[str, Any]
) -> str:
    """One sentence on what was done."""
    size = details.get("facts", {}).get("parameters")
    text = f"A bilingual image-text model of {_count(size)} parameters" if size else "A bilingual image-text model"
    if steps:
        text += f", trained on {_count(steps[-1].get('samples') or 0)} image-text pairs in {steps[-1]['step']:,} steps"
        text += f" ({_duration(_seconds(steps))})"
    sources = [Path(str(source["path"])).name for source in config.get("data", {}).get("sources", [])]
    if sources:
        text += f" from {', '.join(dict.fromkeys(sources))}"
    if environment.get("device"):
        ranks, device = environment.get("world_size", 1), environment["device"]
        if device == "cpu":
            text += f", on {ranks} CPU {'process' if ranks == 1 else 'processes'}"
        else:
            text += f", on {ranks} × {device}"
    return text + "."


def _tiles(details: dict[str, Any], steps: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The run in a few numbers: (value, what it is)."""
    found = []
    if steps:
        rates = sorted(line["samples_per_s"] for line in steps if line.get("samples_per_s"))
        waits = [line["data_wait_share"] for line in steps if line.get("data_wait_share") is not None]
        found += [(f"{steps[-1]['step']:,}", "steps"), (_duration(_seconds(steps)), "in training steps")]
        if rates:
            found.append((f"{rates[len(rates) // 2]:,.0f}", "pairs a second (median)"))
        if waits:
            found.append((f"{100 * sum(waits) / len(waits):.1f}%", "of it waiting for data"))
        if steps[-1].get("mfu"):
            found.append((f"{100 * steps[-1]['mfu']:.0f}%", "of the device's peak (MFU)"))
    if details.get("seconds"):
        found.append((_duration(details["seconds"]), "evaluation"))
    return found


def _headline(details: dict[str, Any], languages: list[str]) -> list[dict[str, Any]]:
    """R@1 of every split, mean of both directions, by language."""
    splits: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in details.get("entries", []):
        if entry["kind"] == "retrieval":
            card = splits.setdefault(
                (entry["task"], entry["split"]), {"task": entry["task"], "split": entry["split"], "by_language": {}}
            )
            numbers = entry["metrics"]
            card["about"] = _about(entry["facts"])
            card["by_language"][entry["language"]] = (numbers["image_to_text/r1"] + numbers["text_to_image/r1"]) / 2
    return list(splits.values())


def _about(facts: dict[str, Any]) -> str:
    """How many pictures were measured, and in which way if not in the usual one."""
    parts = [f"{facts['pictures']:,} pictures"]
    if facts.get("skipped"):
        parts.append(f"{len(facts['skipped']):,} left out, which can't be decoded")
    if facts.get("protocol") == "release":
        parts.append("as the release measures")
    return " · ".join(parts)


def _pair_languages(details: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Entries of a kind by split, their languages side by side."""
    splits: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry in details.get("entries", []):
        if entry["kind"] == kind:
            score = entry["facts"].get("score", "cosine")
            place = splits.setdefault(
                (entry["task"], entry["split"], score),
                {"task": entry["task"], "split": entry["split"], "score": score, "by_language": {}},
            )
            place["by_language"][entry["language"]] = entry
    return list(splits.values())


def _shown_classes(entry: dict[str, Any]) -> list[str]:
    """Classes from best to worst; of many, the 12 at either end."""
    by_class: dict[str, float] = entry["facts"]["by_class"]
    ordered = sorted(by_class, key=lambda key: -by_class[key])
    return ordered if len(ordered) <= 24 else ordered[:12] + ordered[-12:]


def _charts(
    steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], colours: dict[str, int]
) -> list[dict[str, Any]]:
    """Charts that have something to show: title, note, svg, legend [(label, colour, dash)]."""
    found = []

    def add(title: str, name: str, series: list[Series], note: str = "", **options: bool) -> None:
        if svg := chart(series, name=name, **options):
            legend = [(line.label, line.colour, line.dash) for line in series if len(line.x)] if len(series) > 1 else []
            found.append({"title": title, "note": note, "svg": svg, "legend": legend})

    def column(name: str, label: str = "", colour: int = 0, dash: int = 0, factor: float = 1.0) -> Series:
        points = [(line["step"], factor * line[name]) for line in steps if isinstance(line.get(name), int | float)]
        return Series(label, [x for x, _ in points], [y for _, y in points], colour, dash)

    loss = [column(f"loss/{lang}", LANGUAGES.get(lang, lang), colour) for lang, colour in colours.items()]
    loss = [line for line in loss if line.x] or [column("loss", "loss")]
    add("Contrastive loss", "loss", loss)
    accuracy = [
        column(f"cmlm_accuracy/{lang}", LANGUAGES.get(lang, lang), colour, factor=100.0)
        for lang, colour in colours.items()
    ]
    add(
        "Hidden words told",
        "words",
        [line for line in accuracy if line.x],
        "% of tokens, while training",
        from_zero=True,
    )
    add("Error of rebuilt patches", "patches", [column("cmim_error")], "while training")
    recalls = []
    splits = dict.fromkeys(
        tuple(name.split("/")[:2])
        for each in evaluations
        for name in each["metrics"]
        if name.endswith("/text_to_image/r1")
    )
    for dash, (task, split) in enumerate(list(splits)[:4]):
        for lang, colour in colours.items():
            prefix = f"{task}/{split}/{lang}"
            points = [
                (each["step"], (m[f"{prefix}/text_to_image/r1"] + m[f"{prefix}/image_to_text/r1"]) / 2)
                for each in evaluations
                if f"{prefix}/text_to_image/r1" in (m := each["metrics"])
            ]
            label = LANGUAGES.get(lang, lang) + (f", {split.replace('_', ' ')}" if len(splits) > 1 else "")
            recalls.append(Series(label, [x for x, _ in points], [y for _, y in points], colour, dash))
    shown = f"on {next(iter(splits))[1].replace('_', ' ')}, " if len(splits) == 1 else ""
    add("Recall at 1 over training", "recall", recalls, f"%, {shown}mean of both directions", from_zero=True)
    add("Pairs a second", "speed", [column("samples_per_s")], from_zero=True)
    add("Learning rate", "lr", [column("lr")], from_zero=True)
    scales = [name for name in (steps[-1] if steps else {}) if name.startswith("logit_scale")]
    labels = {name: name.removeprefix("logit_scale/").replace("logit_scale", "scale") for name in scales}
    add("Logit scale (inverse temperature)", "scale", [column(n, labels[n], 2 + i) for i, n in enumerate(scales)])
    add("Gradient norm", "norm", [column("grad_norm")], log=True)
    return found


def _facts(config: dict[str, Any], environment: dict[str, Any], details: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values for the foot of the page; only those that are known."""
    model, data, engine = (config.get(part) or {} for part in ("model", "data", "engine"))
    shape = "{hidden_size} wide, {num_layers} + {num_vl_layers} layers, {image_size} px in patches of {patch_size}"
    packages = environment.get("packages") or {}
    commit = environment.get("commit")
    modified = len(environment.get("modified_files") or [])
    rows: list[tuple[str, Any]] = [
        ("Weights", details.get("facts", {}).get("model")),
        ("Model", shape.format(**model) if set(re.findall(r"{(\w+)}", shape)) <= model.keys() else None),
        ("Data", ", ".join(f"{s['path']} ({s.get('split', 'train')})" for s in data.get("sources", []))),
        ("Batch", f"{config['global_batch']} pairs a step" if "global_batch" in config else None),
        ("Optimizer", f"AdamW, learning rate {config['optim']['lr']:g}" if "optim" in config else None),
        ("Precision", engine.get("precision")),
        ("DeepSpeed", engine.get("deepspeed")),
        ("Seed", config.get("seed")),
        ("Machine", f"{environment['cpus']} cores, {environment['memory_gb']} GB" if "cpus" in environment else None),
        ("Versions", ", ".join(f"{name} {packages[name]}" for name in ("torch", "deepspeed") if packages.get(name))),
        ("Code", f"{commit[:10]}{f', {modified} files changed since' if modified else ''}" if commit else None),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _affordable(galleries: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Galleries whose thumbnails fit into the page, and the names of the splits that did not."""
    kept: list[dict[str, Any]] = []
    dropped: list[str] = []
    used = 0
    for each in galleries:
        size = sum(map(len, each["thumbnails"].values()))
        if used + size <= PICTURE_BYTES:
            kept.append({**each, "number": len(kept)})
            used += size
        else:
            dropped.append(f"{each['task']}/{each['split']}")
    return kept, dropped
