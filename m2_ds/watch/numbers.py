"""The newest numbers of a run in words, in groups: the terminal and the page show the same ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from m2_ds.watch.run import WatchedRun, duration

Level = Literal["", "warn", "bad"]
OBJECTIVES = ("loss/unimodal", "loss/vl", "loss/cmlm", "loss/cmim")
NAMES = {
    "loss": "objective",
    "loss/unimodal": "contrastive, unimodal",
    "loss/vl": "contrastive, vl",
    "loss/cmlm": "hidden words (CMLM)",
    "loss/cmim": "hidden patches (CMIM)",
}


@dataclass(frozen=True)
class Number:
    """One line: what it is, its value as text, and whether it is odd."""

    label: str
    text: str
    level: Level = ""


def groups(run: WatchedRun, now: float) -> dict[str, list[Number]]:
    """By title; only what the run tells."""
    found = {
        "loss": _loss(run),
        "optimizer": _some(run, {"lr": ("learning rate", "{:.3g}"), "grad_norm": ("gradient norm", "{:.3g}")})
        + [
            Number(f"logit scale, {name.removeprefix('logit_scale/')}", f"{run.lines.last(name):.1f}")
            for name in run.lines.names("logit_scale/")
            if run.lines.last(name) is not None
        ],
        "speed": _speed(run),
        "data": _data(run),
        "evaluation": _evaluation(run),
        "run": _run(run, now),
    }
    return {title: numbers for title, numbers in found.items() if numbers}


def percent(value: float) -> str:
    return f"{100 * value:.1f}%" if value < 0.1 else f"{100 * value:.0f}%"


def rate(tflops: float) -> str:
    """TFLOP/s in the unit that fits."""
    return f"{tflops * 1000:.0f} GFLOP/s" if tflops < 1 else f"{tflops:.1f} TFLOP/s"


def _some(run: WatchedRun, wanted: dict[str, tuple[str, str | Callable[[float], str]]]) -> list[Number]:
    found = []
    for name, (label, form) in wanted.items():
        value = run.lines.last(name)
        if value is not None:
            found.append(Number(label, form.format(value) if isinstance(form, str) else form(value)))
    return found


def _loss(run: WatchedRun) -> list[Number]:
    languages = [name for name in run.lines.names("loss/") if name not in OBJECTIVES]
    order = ("loss", "loss/unimodal", "loss/vl", *languages, "loss/cmlm", "loss/cmim")
    if len(run.lines) and run.lines.last("loss") is None:
        return [Number("objective", "not finite", "bad")]
    found = _some(run, {name: (NAMES.get(name, name.removeprefix("loss/")), "{:.4g}") for name in order})
    told = {name: (f"words told, {name.split('/')[1]}", percent) for name in run.lines.names("cmlm_accuracy/")}
    return found + _some(run, {**told, "cmim_error": ("error of patches", "{:.3g}")})


def _speed(run: WatchedRun) -> list[Number]:
    last = run.lines.last
    found = _some(run, {"samples_per_s": ("pairs a second", "{:,.0f}"), "step_s": ("a step", "{:.3g} s")})
    found += _some(run, {"mfu": ("MFU", percent), "tflops": ("a rank", rate)})
    for name, label, high in (
        ("data_wait_share", "waiting for data", 0.1),
        ("communication_share", "communication", 0.5),
        ("bubble_share", "pipeline bubble", 0.5),
    ):
        if (value := last(name)) is not None:
            found.append(Number(label, percent(value), "warn" if value > high else ""))
    return found + _some(run, {"memory_gb": ("memory, fullest rank", "{:.2f} GB")})


def _data(run: WatchedRun) -> list[Number]:
    last = run.lines.last
    found = [
        Number(f"epochs, {name.removeprefix('epochs/')}", f"{value:.2f}")
        for name in run.lines.names("epochs/")
        if (value := last(name)) is not None
    ]
    samples = last("samples") or 0.0
    for name in run.lines.names("skipped/"):
        if value := last(name):
            share = value / samples if samples else 0.0
            level: Level = "bad" if share > 0.05 else "warn"
            found.append(Number(f"skipped, {name.removeprefix('skipped/')}", f"{value:,.0f}", level))
    if value := last("other_language"):
        found.append(Number("in another language", f"{value:,.0f}"))
    return found + _some(run, {"repeated_share": ("repeated in a batch", "{:.2f}")})


def recalls(metrics: dict[str, float]) -> dict[str, float]:
    """What sums an evaluation up, in percent, by ``set/split/language[/what]``."""
    found = {}
    for name, value in metrics.items():
        place, _, metric = name.rpartition("/")
        if metric == "mean_recall":
            found[place] = value
        elif metric == "top1" or (metric == "accuracy" and place.endswith(("/all", "/hidden_words"))):
            found[f"{place.removesuffix('/all')}/{metric}"] = value
    return found


def _evaluation(run: WatchedRun) -> list[Number]:
    if not run.evaluations:
        return []
    step, metrics = next(reversed(run.evaluations.items()))
    before = list(run.evaluations.values())[-2] if len(run.evaluations) > 1 else {}
    found = [Number("after step", f"{step:,}")]
    for name, value in recalls(metrics).items():
        old = recalls(before).get(name)
        found.append(Number(name, f"{value:.1f}%" + (f" ({value - old:+.1f})" if old is not None else "")))
    return found


def _run(run: WatchedRun, now: float) -> list[Number]:
    found = []
    if run.checkpoint:
        step, written = run.checkpoint
        found.append(Number("checkpoint", f"step {step:,}, {duration(max(0.0, now - written))} ago"))
    elif len(run.lines):
        found.append(Number("checkpoint", "none yet"))
    device, ranks = run.environment.get("device"), run.environment.get("world_size")
    if device and ranks:
        found.append(Number("machine", f"{ranks} x {device}"))
    for kind in dict.fromkeys(event.kind for event in run.events):
        some = [event for event in run.events if event.kind == kind]
        found.append(Number(kind, f"{len(some)}, last at step {some[-1].step:,}: {some[-1].reason}", "warn"))
    return found
