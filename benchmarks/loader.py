#!/usr/bin/env python
"""Pictures a second that one core makes ready for training, beside the peer open_clip, on this machine, in one run.

Each side runs as one process on one core, without loader processes: from files on disk to batches of squares and
token ids. The sides take turns (peer, m2_ds, peer, m2_ds ...); the median of each side's turns counts.

    jpeg   640 x 480, about 83 kB, to 224: random crop of 0.9 to 1 of the area, bicubic (open_clip's default)
    png    128 x 128 to 48, likewise; scenes by default, or a data set given with --png

    benchmarks/peer/setup.sh build/peer-venv
    python benchmarks/loader.py --peer-python build/peer-venv/bin/python

The JPEGs are made here: smooth colours with grain, so much of it that they compress like photographs.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from peer import make_tars
from PIL import Image
from tables import machine, publish

from m2_ds.data.config import AugmentConfig, DataConfig, SourceConfig
from m2_ds.data.decode import decode
from m2_ds.data.image import TrainTransform
from m2_ds.data.memory import keep_freed_memory
from m2_ds.data.shards import Caption, Record, ShardWriter, open_dataset
from m2_ds.data.sources import scenes
from m2_ds.data.stream import build_loader
from m2_ds.data.text import load_tokenizer
from m2_ds.data.text_train import train

HERE = Path(__file__).resolve().parent
Case = Literal["jpeg", "png"]
SIZES: dict[Case, int] = {"jpeg": 224, "png": 48}
JPEGS, JPEG_BYTES = 512, 83_000


def photograph(number: int) -> np.ndarray:
    """uint8 [480, 640, 3]: slow waves of colour, edges, and grain."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[:480, :640] / 640
    picture = np.zeros((480, 640, 3))
    for channel in range(3):
        a, b, phase = random.uniform(2, 9), random.uniform(2, 9), random.uniform(0, 6)
        picture[..., channel] = 128 + 70 * np.sin(a * x + phase) * np.cos(b * y - phase)
    for _ in range(12):
        cx, cy, radius = random.uniform(0, 1), random.uniform(0, 0.75), random.uniform(0.02, 0.15)
        picture[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] += random.uniform(-60, 60, 3)
    return np.clip(picture + random.normal(0, 7, (480, 640, 1)), 0, 255).astype(np.uint8)


def jpeg(number: int) -> bytes:
    """One picture at the quality that brings it closest to the wanted number of bytes."""
    picture = Image.fromarray(photograph(number))
    low, high = 40, 98
    while high - low > 1:
        middle = (low + high) // 2
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=middle)
        low, high = (middle, high) if out.tell() < JPEG_BYTES else (low, middle)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=low)
    return out.getvalue()


def make_jpegs(folder: Path) -> None:
    """The JPEG set as shards, unless it is there."""
    if (folder / "manifest.json").exists():
        return
    with ShardWriter(folder, "bench-jpeg") as writer:
        for number in range(JPEGS):
            captions = [Caption(f"a made-up photograph, number {number}", "en")]
            record = Record(f"{number:05d}", jpeg(number), captions, f"{number}", "bench", "CC0-1.0", 640, 480)
            writer.add("train", record)


def our_loader(folder: Path, tokenizer: Path, size: int, batch: int, cache_mb: int) -> Any:
    """This rank's stream over one data set, made in this process."""
    config = DataConfig(
        sources=[SourceConfig(path=folder)],
        languages={"en": 1.0},
        image_size=size,
        augment=AugmentConfig(crop_scale=(0.9, 1.0), crop_ratio=(0.9, 1.1)),
        picture_cache_mb=cache_mb,
    )
    return build_loader(config, load_tokenizer(tokenizer), global_batch=batch, micro_batch=batch, seed=0)


def turn(folder: Path, tokenizer: Path, size: int, batch: int, pictures: int, cache_mb: int) -> float:
    """Pictures a second of m2_ds, in this process."""
    torch.set_num_threads(1)
    rows = len(open_dataset(folder).split("train"))
    batches = iter(our_loader(folder, tokenizer, size, batch, cache_mb))
    for _ in range(1 + (2 * rows // batch if cache_mb else 0)):
        next(batches)
    for _ in range(8):  # what the thread had made ahead
        next(batches)
    start = time.perf_counter()
    done = 0
    while done < pictures:
        done += len(next(batches).images)
    return done / (time.perf_counter() - start)


def stages(folder: Path, size: int) -> dict[str, float]:
    """Microseconds a picture of what a JPEG goes through, medians over 200 pictures, and of what was not chosen."""
    torch.set_num_threads(1)
    keep_freed_memory()
    transform = TrainTransform(AugmentConfig(crop_scale=(0.9, 1.0), crop_ratio=(0.9, 1.1)), size, seed=0)
    split = open_dataset(folder).split("train")
    draws = transform.draws(np.arange(200))
    taken: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        taken.setdefault(name, []).append((time.perf_counter() - start) * 1e6)
        return result

    for record, draw in zip(split.read(range(200)), draws, strict=True):
        data, scale = record.image, transform.scale(draw)
        small = timed("decode at a reduced scale", lambda data=data, scale=scale: np.array(decode(data, scale)))
        full = timed("(decode in full)", lambda data=data: np.array(decode(data)))
        timed("crop and resize", lambda small=small, draw=draw: transform.geometry(small, draw))
        timed("(crop and resize in full)", lambda full=full, draw=draw: transform.geometry(full, draw))
        picture = Image.fromarray(small)
        timed(
            "(resize by Pillow)",
            lambda picture=picture: np.array(picture.resize((size, size), Image.Resampling.BICUBIC)),
        )
    return {name: round(statistics.median(values)) for name, values in taken.items()}


def on_core(core: int, command: list[str]) -> str:
    """The output of a program that may use one core."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509
    )
    if done.returncode:
        raise ValueError(f"{' '.join(command[:3])} ... failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


def ours(core: int, arguments: tuple[Any, ...]) -> float:
    """One turn of m2_ds in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from pathlib import *; import loader; "
    return float(on_core(core, [sys.executable, "-c", code + f"print(loader.turn(*{arguments!r}))"]))


def make_sets(work: Path, png: Path | None, cases: Sequence[Case]) -> tuple[dict[Case, Path], Path]:
    """Data sets of the cases and a tokenizer, in ``work``; ``png``: a data set to take instead of scenes."""
    work.mkdir(parents=True, exist_ok=True)
    make_jpegs(work / "jpeg")
    if png is None and "png" in cases:
        scenes.build(work / "png", train=4096, val=0, test=0)
    return {"jpeg": work / "jpeg", "png": png or work / "png"}, make_tokenizer(work)


def make_tokenizer(work: Path) -> Path:
    tokenizer = work / "tokenizer"
    if not tokenizer.exists():
        train(tokenizer, vocab_size=8192, quick=True)
    return tokenizer


def measure(
    *,
    peer_python: Path | None = None,
    png: Path | None = None,
    cases: tuple[Case, ...] = ("jpeg", "png"),
    turns: int = 3,
    pictures: int = 1024,
    batch: int = 64,
    core: int | None = None,
    work: Path = Path("build/loader"),
    out: Path = HERE / "results" / "loader.json",
) -> None:
    """Measure both sides in turns; print a table, and write it and every number.

    Args:
        peer_python: Python of the peer's environment (benchmarks/peer/setup.sh); without it m2_ds is measured alone.
        png: data set of 128 px PNGs with a train split; by default scenes are generated.
        cases: what to measure.
        turns: turns of each side.
        pictures: pictures timed in a turn; four times as many for png.
        batch: pictures a batch.
        core: the core that both use; by default the last one this process may use.
        work: folder for data sets and tars.
        out: results; a table of the same name ending in .md is written beside it.
    """
    core = max(os.sched_getaffinity(0)) if core is None else core
    sets, tokenizer = make_sets(work, png, cases)
    rows = []
    versions: dict[str, str] = {}
    for case in cases:
        size, folder = SIZES[case], sets[case]
        asked = pictures * (4 if case == "png" else 1)
        found: dict[str, list[float]] = {"peer": [], "m2_ds": []}
        if case == "png":
            found["m2_ds, decoded pictures kept"] = []
        if peer_python is not None:
            tars = make_tars.write(folder, work / f"{case}-tars", languages=("en",), shards=4)
        for _ in range(turns):
            if peer_python is not None:
                script = [str(peer_python), str(HERE / "peer" / "loader.py"), "--tars", str(tars.resolve())]
                numbers = ["--size", str(size), "--batch", str(batch), "--pictures", str(asked)]
                result = json.loads(on_core(core, script + numbers))
                found["peer"].append(result.pop("pictures_per_s"))
                versions = result
            found["m2_ds"].append(ours(core, (folder, tokenizer, size, batch, asked, 0)))
            if case == "png":
                found["m2_ds, decoded pictures kept"].append(ours(core, (folder, tokenizer, size, batch, asked, 1024)))
            print(case, {side: [round(rate) for rate in rates] for side, rates in found.items()}, flush=True)
        medians = {side: statistics.median(rates) for side, rates in found.items() if rates}
        row: dict[str, Any] = {"case": case, "pictures_per_s": medians, "turns": found}
        row["ratio"] = {side: rate / medians["peer"] for side, rate in medians.items() if "peer" in medians}
        if case == "jpeg":
            sizes = [len(record["image"]) for record in open_dataset(folder).split("train").iter(["image"])]
            row["mean_bytes"] = statistics.mean(sizes)
            code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from pathlib import *; import json, loader; "
            code += f"print(json.dumps(loader.stages({folder!r}, {size})))"
            row["stages_us"] = json.loads(on_core(core, [sys.executable, "-c", code]))
        rows.append(row)
    own = {"torch": version("torch"), "pillow": version("pillow")}
    about = machine() | {"batch": batch, "m2_ds": own, "peer": versions}
    publish(out, {"about": about, "cases": rows}, table(rows, about))


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        "# Loader, m2_ds beside open_clip: pictures a second and core",
        "",
        f"{about['cpu']}, one core; {about['date']}. Medians of turns taken alternately; batch {about['batch']}.",
        "",
        "| case | side | pictures/s | turns | times the peer |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        for side, rate in row["pictures_per_s"].items():
            turns = ", ".join(f"{value:.0f}" for value in row["turns"][side])
            ratio = f"{row['ratio'][side]:.2f}" if side in row["ratio"] else ""
            lines.append(f"| {row['case']} | {side} | {rate:.0f} | {turns} | {ratio} |")
    for row in rows:
        if "stages_us" in row:
            kilobytes = row["mean_bytes"] / 1000
            lines += ["", f"Microseconds a picture ({kilobytes:.0f} kB each); in brackets, what was not chosen:", ""]
            lines += [f"- {name}: {value:.0f}" for name, value in row["stages_us"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(measure, description=__doc__)
