#!/usr/bin/env python
"""Time and size of exported graphs beside the model in torch: pictures and captions alone and in a batch, on a CPU.

A preset has random weights, of which neither time nor size depends.

    python benchmarks/onnx_export.py runs/emoji 0.4b --tokenizer data/tokenizer-emoji
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tables import publish

import m2_ds
from m2_ds.convert.onnx.check import CAPTIONS, smooth_pictures
from m2_ds.convert.onnx.export import export
from m2_ds.data.text import load_tokenizer

HERE = Path(__file__).resolve().parent
SIDES = ("torch", "fp32", "int8")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("0.4b",)
    """What `m2_ds.load` takes."""
    tokenizer: Path = Path("data/tokenizer-emoji")
    """For presets, which have none."""
    batch: int = 16
    """Pictures, or captions, of the batch."""
    turns: int = 7
    """Of which the median is taken; the sides take turns."""
    threads: int = 1
    """Of torch and of onnxruntime."""
    out: Path = HERE / "results" / "onnx_export.json"
    """Results; a table of the same name ending in .md is written beside it."""


def milliseconds(calls: dict[str, Callable[[], Any]], options: Options) -> dict[str, float]:
    """Medians; the first turn does not count. Of one thread its time on the processor, whoever else is there."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {side: [] for side in calls}
    for turn in range(options.turns + 1):
        for side, call in calls.items():
            start = clock()
            call()
            if turn:
                taken[side].append(1000 * (clock() - start))
    return {side: statistics.median(times) for side, times in taken.items()}


def measure(name: str, options: Options, folder: Path) -> dict[str, Any]:
    """Sizes in bytes, times in milliseconds."""
    model, processor = m2_ds.load(name)
    if processor.tokenizer is None:
        processor.tokenizer = load_tokenizer(options.tokenizer, max_length=model.config.max_text_length)
    start = time.perf_counter()
    found = export(model, processor.tokenizer, folder, int8=True)
    seconds = time.perf_counter() - start
    sides: dict[str, Any] = {"torch": model}
    sides |= {p: m2_ds.load_onnx(folder, p, threads=options.threads)[0] for p in ("fp32", "int8")}  # type: ignore[arg-type]
    times = {}
    captions = (CAPTIONS * (1 + options.batch // len(CAPTIONS)))[: options.batch]
    with torch.inference_mode():
        for batch in (1, options.batch):
            pictures, texts = smooth_pictures(batch, model.config.image_size), processor.texts(captions[:batch])
            for what, inputs in (("image", (pictures,)), ("text", texts)):
                calls = {side: partial(getattr(each, f"encode_{what}"), *inputs) for side, each in sides.items()}
                times[f"{what}, {batch}"] = milliseconds(calls, options)
                print(name, what, batch, times[f"{what}, {batch}"], flush=True)
    return {"model": name, "export_s": seconds, "sizes": found.sizes, "difference": found.difference, "ms": times}


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    results = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(name, options, Path(folder) / "out"))
    lines = [
        "# ONNX graphs beside torch", "",
        f"{time.strftime('%Y-%m-%d')}; medians of {options.turns} turns, ms "
        f"{'on the processor, of one thread' if options.threads == 1 else f'on the wall, {options.threads} threads'}. "
        "Captions of a batch have 6 to 19 tokens; torch leaves out their padding.", "",
        "| model | tower, batch | torch | fp32 | int8 | torch / fp32 | torch / int8 | fp32 / int8 |",
        "|" + "---|" * 8,
    ]  # fmt: skip
    for result in results:
        for what, ms in result["ms"].items():
            cells = [f"{ms[side]:.1f}" for side in SIDES]
            cells += [f"{ms[a] / ms[b]:.2f}" for a, b in (("torch", "fp32"), ("torch", "int8"), ("fp32", "int8"))]
            lines.append(f"| {Path(result['model']).name} | {what} | {' | '.join(cells)} |")
    lines += ["", "| model | file | MB | in int8 | export, s |", "|---|---|---|---|---|"]
    for result in results:
        for tower in ("image", "text"):
            whole, small = (result["sizes"][f"{tower}{end}.onnx"] / 1e6 for end in ("", ".int8"))
            cells = [f"{whole:.1f}", f"{small:.1f}", f"{result['export_s']:.0f}"]
            lines.append(f"| {Path(result['model']).name} | {tower}.onnx | {' | '.join(cells)} |")
    publish(options.out, {"threads": options.threads, "runs": results}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
