"""What the page draws: every chart's series, few enough points for a browser, over four horizontal axes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2_ds.watch.follow import thin
from m2_ds.watch.numbers import NAMES, OBJECTIVES, groups, recalls
from m2_ds.watch.run import WatchedRun
from m2_ds.watch.terminal import progress

POINTS = 600  # of one series
AXES = {
    "step": "optimizer steps",
    "samples": "pairs seen",
    "trained": "hours of training",
    "clock": "hours since the first line",
}
RARE = ("skipped", "phases", "shares")  # charts without the series that are zero throughout
# Of the environment, what a comparison tells beside the configuration.
ENVIRONMENT = ("m2_ds", "commit", "host", "device", "world_size")
Column = tuple[str, str]  # name in the log, label on the page


@dataclass(frozen=True)
class Chart:
    """``columns``: of a run's log, or None for what evaluations found; ``factor`` is multiplied in."""

    key: str
    title: str
    note: str
    columns: Callable[[WatchedRun], list[Column]] | None
    factor: float = 1.0
    log: bool = False
    from_zero: bool = False


def _named(*names: str) -> Callable[[WatchedRun], list[Column]]:
    return lambda run: [(name, NAMES.get(name, name.split("/")[-1].replace("_", " "))) for name in names]


def _below(*prefixes: str) -> Callable[[WatchedRun], list[Column]]:
    return lambda run: [(name, name.split("/", 1)[1]) for prefix in prefixes for name in run.lines.names(prefix)]


def _languages(run: WatchedRun) -> list[Column]:
    return [(name, label) for name, label in _below("loss/")(run) if name not in OBJECTIVES]


def _shares(run: WatchedRun) -> list[Column]:
    names = {"data_wait_share": "data", "communication_share": "communication", "bubble_share": "pipeline"}
    return list(names.items())


def _skipped(run: WatchedRun) -> list[Column]:
    return [*_below("skipped/")(run), ("other_language", "in another language")]


CHARTS = [
    Chart("loss", "Objective", "levels and masked losses, weighted", _named("loss")),
    Chart("levels", "Contrastive loss", "by level", _named("loss/unimodal", "loss/vl")),
    Chart("languages", "Contrastive loss by language", "mean of the levels", _languages),
    Chart("masked", "Masked losses", "by hidden token and patch", _named("loss/cmlm", "loss/cmim")),
    Chart("words", "Hidden words told", "% of tokens, while training", _below("cmlm_accuracy/"), 100, from_zero=True),
    Chart("recall", "Recall", "mean of R@1, 5, 10 in both directions, %", None, from_zero=True),
    Chart("accuracy", "Other evaluations", "accuracy, %", None, from_zero=True),
    Chart("speed", "Pairs a second", "over all ranks", _named("samples_per_s"), from_zero=True),
    Chart("mfu", "MFU", "% of the device's peak", _named("mfu"), 100, from_zero=True),
    Chart("tflops", "Arithmetic", "TFLOP/s of one rank", _named("tflops"), from_zero=True),
    Chart("shares", "Waiting", "% of the step", _shares, 100, from_zero=True),
    Chart("phases", "Phases of a step", "seconds, first rank", _below("seconds/"), from_zero=True),
    Chart("lr", "Learning rate", "", _named("lr"), from_zero=True),
    Chart("norm", "Gradient norm", "before clipping, log scale", _named("grad_norm"), log=True),
    Chart("scale", "Logit scale", "inverse temperature", _below("logit_scale/")),
    Chart("memory", "Memory", "GB, fullest rank", _named("memory_gb"), from_zero=True),
    Chart("skipped", "Pairs replaced", "since the beginning", _skipped, from_zero=True),
    Chart("epochs", "Epochs", "by source", _below("epochs/"), from_zero=True),
]


def curves(run: WatchedRun) -> dict[str, Any]:
    """JSON-able: ``rows`` and ``evaluations`` hold the axes, each series the places in them (``i``) and its ``y``."""
    series: dict[str, list[dict[str, Any]]] = {}
    used: set[int] = set()
    for chart in CHARTS:
        for name, label in chart.columns(run) if chart.columns else []:
            values = run.lines.get(name) * chart.factor
            if chart.log:
                values[values <= 0] = np.nan
            places = thin(values, POINTS)
            if len(places) and (chart.key not in RARE or values[places].any()):
                used.update(places.tolist())
                one = {"label": label, "of": "rows", "i": places.tolist(), "y": _short(values[places])}
                series.setdefault(chart.key, []).append(one)
    rows = sorted(used)
    place_of = {row: place for place, row in enumerate(rows)}
    for some in series.values():
        for one in some:
            one["i"] = [place_of[row] for row in one["i"]]
    evaluated = [recalls(metrics) for metrics in run.evaluations.values()]
    for name in dict.fromkeys(name for metrics in evaluated for name in metrics):
        found = [(i, metrics[name]) for i, metrics in enumerate(evaluated) if name in metrics]
        drawn = {"label": name, "of": "evaluations", "i": [i for i, _ in found], "y": [y for _, y in found]}
        plain = any(f"{name}/mean_recall" in metrics for metrics in run.evaluations.values())
        series.setdefault("recall" if plain else "accuracy", []).append(drawn)
    axes = _axes(run)
    at = np.array(list(run.evaluations), dtype=np.float64)
    return {
        "rows": {axis: _short(values[rows]) for axis, values in axes.items()},
        "evaluations": {axis: _short(np.interp(at, axes["step"], x)) if len(x) else [] for axis, x in axes.items()},
        "series": series,
        "events": [
            {"kind": event.kind, "reason": event.reason, **place}
            for event, place in zip(run.events[-100:], _places(run, axes))
        ],
    }


def _axes(run: WatchedRun) -> dict[str, np.ndarray]:
    """[rows] each; the clock stands at the training's hours in logs whose lines tell no time."""
    step, samples, at = (run.lines.get(name) for name in ("step", "samples", "time"))
    if not len(step):
        return dict.fromkeys(AXES, step)
    own = np.nan_to_num(run.lines.get("step_s")) * np.diff(step, prepend=0.0)
    trained, known = np.cumsum(own), np.isfinite(at)
    clock = np.interp(step, step[known], at[known]) - (at[known][0] - trained[known][0]) if known.any() else trained
    return {"step": step, "samples": np.nan_to_num(samples), "trained": trained / 3600, "clock": clock / 3600}


def _places(run: WatchedRun, axes: dict[str, np.ndarray]) -> Iterator[dict[str, float]]:
    for event in run.events[-100:]:
        yield {
            axis: float(np.interp(event.step, axes["step"], x)) if len(x) else float(event.step)
            for axis, x in axes.items()
        }


def _short(values: np.ndarray) -> list[float]:
    """Seven digits: more cannot be seen, and they are most of the bytes."""
    return [float(f"{value:.7g}") for value in values]


def summary(run: WatchedRun, now: float) -> dict[str, Any]:
    """The newest numbers and how the run stands; small enough to be sent at every look."""
    standing = run.standing(now)
    return {
        "name": run.name,
        "folder": str(run.folder),
        "version": run.version,
        "state": standing.state,
        "words": standing.words,
        "progress": progress(standing),
        "share": min(1.0, standing.step / standing.steps) if standing.steps else None,
        "step": standing.step,
        "notes": run.notes,
        "groups": {
            title: [{"label": n.label, "text": n.text, "level": n.level} for n in some]
            for title, some in groups(run, now).items()
        },
    }


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a configuration by dotted name; an empty list or mapping is one."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items or (isinstance(tree, list) and not any(isinstance(item, dict | list) for item in tree)):
        yield prefix, tree
        return
    for name, value in items:
        yield from flat(value, f"{prefix}.{name}" if prefix else str(name))


def differences(runs: list[WatchedRun]) -> list[dict[str, Any]]:
    """Fields of the configurations, and of what the runs ran on, that are not the same in all of them."""
    if len(runs) < 2:
        return []
    trees = []
    for run in runs:
        fields = dict(flat(run.config)) if run.config else {}
        fields.pop("folder", None)
        found = {f"environment: {name}": run.environment[name] for name in ENVIRONMENT if name in run.environment}
        trees.append({**fields, **found})
    names = dict.fromkeys(name for tree in trees for name in tree)
    shown = [(name, ["–" if name not in tree else _text(tree[name]) for tree in trees]) for name in names]
    return [{"field": name, "values": values} for name, values in shown if len(set(values)) > 1]


def _text(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def charts() -> list[dict[str, Any]]:
    """What the page has to know of each chart."""
    return [{**vars(chart), "columns": None} for chart in CHARTS]
