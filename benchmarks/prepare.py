"""What a preparation costs and finds: planted defects, pairs/s/core by stage, memory, workers, engine.

    python benchmarks/prepare.py --sets data/emoji data/scenes

Makes tars of raw pairs with defects at known rates (prepare_noise.py), prepares them with all steps, and compares what
every rule took with the truth. Rates are of CPU time, so that other programs on the machine change them little; wall
times of one and two workers are taken in turns.
"""

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import tyro
import yaml
from prepare_noise import REPEATS, Maker, quality, write_evaluation_set, write_tar
from tables import machine, publish

from m2_ds.data.reader import open_dataset
from m2_ds.data.sources.spread import spread
from m2_ds.prepare.config import PictureConfig, load_config
from m2_ds.prepare.pairs import Drop
from m2_ds.prepare.picture import examine, mean_colours, perceptual_hashes

HERE = Path(__file__).parent
Part = Literal["quality", "memory", "workers", "photos", "similarity", "engine"]
PER_TAR = 1000
WEB_PAIRS = 6_000_000_000
PICTURES, SIGNATURES = "pictures: header, decode, rules, evaluation sets", "hashes, colours, table"
STEPS = {
    "read tar": "read",
    "captions: clean, language, rules": "captions",
    "scores that the input has": "columns",
    PICTURES: "pictures",
    SIGNATURES: "signatures",
}


def make_tar(tar: int, sets: tuple[Path, ...], folder: Path) -> int:
    """One tar, in a worker."""
    write_tar(maker_of(sets), folder, tar, tar * PER_TAR, PER_TAR)
    return tar


maker_of = functools.lru_cache(maxsize=1)(Maker)


def make_input(sets: tuple[Path, ...], folder: Path, pairs: int) -> None:
    """Tars that are not there yet, and the evaluation set."""
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    if not (folder / "evaluation" / "manifest.json").exists():
        write_evaluation_set(maker_of(sets), folder / "evaluation")
    missing = [n for n in range(-(-pairs // PER_TAR)) if not (folder / "raw" / f"{n:05d}.truth").exists()]
    for _ in spread(partial(make_tar, sets=sets, folder=folder / "raw"), missing, "making tars", chunk=1):
        pass


def write_settings(folder: Path, out: Path, pairs: int, first: int = 0, **more: Any) -> Path:
    """The preparation of some tars, with every step."""
    last = first + -(-pairs // PER_TAR) - 1
    files = str(folder / "raw" / f"{{{first:05d}..{last:05d}}}.tar")
    tree = {
        "out": str(out),
        "name": "noisy",
        "inputs": [{"name": "noisy", "kind": "tar", "files": files, "license": "CC0-1.0"}],
        "columns": [{"field": "punsafe", "max": 0.5, "rule": "unsafe"}],
        "evaluation_sets": {"paths": [str(folder / "evaluation")]},
        "duplicates": {"caption_repeats": REPEATS},
        "balance": {"languages": {"en": 0.5, "zh": 0.5}},
        "output": {"shard_mb": 64, "splits": {"val": 0.01}},
        # As many rows in memory for the small input as for the ten times larger one.
        "exchange_rows": 20_000,
    } | more
    path = folder / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    return path


def prepare(settings: Path, workers: int) -> dict[str, Any]:
    """One run of the command: its timing.json, with wall seconds of the whole command and peak memory in MB."""
    out = load_config(settings).out
    shutil.rmtree(out, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "m2_ds.cli", "prepare", str(settings), "--workers", str(workers)]
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks: dict[str, float] = {}
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks), daemon=True)
    watcher.start()
    _, told = process.communicate()
    if process.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{told[-2000:]}")
    timing = json.loads((out / "timing.json").read_text())
    return timing | {"command_s": time.monotonic() - start, "peak_mb": peaks}


def _watch(root: int, peaks: dict[str, float]) -> None:
    """Largest private memory (USS) of the command itself, of its largest worker, and of everything together."""
    while True:
        try:
            parent = psutil.Process(root)
            family = parent.children(recursive=True)
            own = parent.memory_full_info().uss / 1e6
        except psutil.Error:
            return
        together, worker = own, 0.0
        for child in family:
            try:
                size, title = child.memory_full_info().uss / 1e6, "".join(child.cmdline()[:1])
            except psutil.Error:
                continue
            together += size
            worker = max(worker, size if title.startswith("ray::") and "Agent" not in title else 0.0)
        for name, value in (("command", own), ("largest worker", worker), ("all processes", together)):
            peaks[name] = max(peaks.get(name, 0.0), value)
        time.sleep(0.25)


def stages(timing: dict[str, Any], pairs: int) -> list[dict[str, Any]]:
    """Microseconds of CPU time a pair, for each stage and step."""
    rows = [{"stage": name, "us": 1e6 * timing["stages"].get(key, 0.0) / pairs} for name, key in STEPS.items()]
    examined = sum(row["us"] for row in rows)
    steps = {name: 1e6 * seconds / pairs for name, seconds in timing["cpu"].items()}
    rows.append({"stage": "files, samples, the rest of examine", "us": steps.pop("examine") - examined})
    rows += [{"stage": name, "us": us} for name, us in steps.items()]
    rows.append({"stage": "end to end", "us": sum(row["us"] for row in rows)})
    return [row | {"pairs_per_s_core": 1e6 / max(row["us"], 1e-3)} for row in rows]


def photographs(count: int = 300) -> dict[str, float]:
    """Microseconds a picture of 640 x 480 (83 kB) through the rules for pictures and the signatures."""
    import loader

    pictures = [loader.jpeg(number) for number in range(12)]
    rules = PictureConfig()
    start = time.process_time()
    thumbnails = []
    for number in range(count):
        found = examine(pictures[number % 12], rules)
        assert not isinstance(found, Drop)
        thumbnails.append(found.thumbnail)
    perceptual_hashes(np.stack(thumbnails))
    mean_colours(np.stack(thumbnails))
    return {
        "us": 1e6 * (time.process_time() - start) / count,
        "bytes": statistics.mean(len(picture) for picture in pictures),
    }


def similarity(sets: tuple[Path, ...], count: int = 512) -> dict[str, float]:
    """Microseconds a pair of the smallest preset (random weights, byte tokens) on one core; decoding left out."""
    import io

    import torch
    from PIL import Image

    import m2_ds
    from m2_ds.prepare.scorers import M2Scorer

    torch.set_num_threads(1)

    class Bytes:
        def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            ids = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor([b % 200 + 4 for b in text.encode()[:30]]) for text in texts], batch_first=True
            )
            return ids, (ids > 0).long()

    records = open_dataset(sets[0]).split("train").read(range(count))
    scorer = M2Scorer.__new__(M2Scorer)
    scorer.torch, scorer.device = torch, "cpu"
    scorer.model, scorer.processor = m2_ds.load("tiny")
    scorer.processor.tokenizer = Bytes()  # type: ignore[assignment]
    pictures = [Image.open(io.BytesIO(record.image)).convert("RGB") for record in records]
    start = time.process_time()
    for low in range(0, count, 64):
        some = records[low : low + 64]
        scorer(pictures[low : low + 64], [r.captions[0].text for r in some], range(len(some)))
    parameters = sum(p.numel() for p in scorer.model.parameters())
    return {"us": 1e6 * (time.process_time() - start) / count, "parameters": parameters}


def engine(pairs: int = 20_000, size: int = 10_000) -> dict[str, float]:
    """Seconds that Ray takes: to start, for 1000 empty tasks, and for pairs of `size` bytes through Ray Data."""
    import ray
    import ray.data

    start = time.monotonic()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    found = {"start": time.monotonic() - start}

    def nothing(number: int) -> int:
        return number

    task = ray.remote(nothing)
    ray.get([task.remote(n) for n in range(4)])
    start = time.monotonic()
    ray.get([task.remote(n) for n in range(1000)])
    found["1000 empty tasks"] = time.monotonic() - start
    ray.data.DataContext.get_current().enable_progress_bars = False

    def pictures(batch: dict[str, Any]) -> dict[str, Any]:
        return {"id": batch["id"], "image": np.array([os.urandom(4) * (size // 4) for _ in batch["id"]], dtype=object)}

    for count in (1, 3):
        start = time.monotonic()
        data = ray.data.range(pairs).map_batches(pictures, batch_size=1000)
        for stage in range(count - 1):  # other resources: Ray Data would fuse equal stages
            data = data.map_batches(lambda batch: batch, batch_size=1000, num_cpus=0.9 - stage / 10)
        rows = sum(len(batch["id"]) for batch in data.iter_batches(batch_size=None))
        assert rows == pairs
        found[f"Ray Data, {pairs:,} pairs of 10 kB through {count} stages"] = time.monotonic() - start
    ray.shutdown()
    return found


def compare_workers(folder: Path, pairs: int, turns: int) -> dict[str, Any]:
    """Wall seconds of all steps with one and with two workers, in turns; Ray's start is not in them."""
    settings = write_settings(folder, folder / "workers", pairs)
    walls: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(turns):
        for workers in walls:
            timing = prepare(settings, int(workers))
            walls[workers].append(sum(timing["wall"].values()))
            print(f"{workers} workers: {walls[workers][-1]:.1f} s", flush=True)
    shutil.rmtree(folder / "workers", ignore_errors=True)
    medians = {workers: statistics.median(times) for workers, times in walls.items()}
    return {"pairs": pairs, "walls": walls, "ratio": medians["1"] / medians["2"]}


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    about = result["about"]
    lines = ["# Preparation", "", f"{about['cpu']}, {about['cores']} cores; {about['date']}; {about['versions']}."]

    def part(title: str, *header: str) -> None:
        lines.extend(["", f"## {title}", ""])
        if header:
            lines.extend([_row(*header), "|---" * len(header) + "|"])

    if "quality" in result:
        part(
            f"Planted defects in {result['pairs']:,} pairs",
            "rule",
            "planted",
            "to find",
            "taken",
            "recall",
            "precision",
        )
        *rules, clean = result["quality"]
        for row in rules:
            shown = [f"{row[name]:.4f}" if row[name] is not None else "" for name in ("recall", "precision")]
            counts = [f"{row[name]:,}" for name in ("planted", "expected", "taken")]
            lines.append(_row(row["rule"], *counts, *shown))
        lines += [
            "",
            f"Of {clean['planted']:,} records without a defect these were left out: {clean['lost'] or 'none'}.",
        ]
        part("CPU time", "stage", "us a pair", "pairs/s/core")
        lines += [_row(r["stage"], f"{r['us']:.1f}", f"{r['pairs_per_s_core']:,.0f}") for r in result["stages"]]
    if "memory" in result:
        names = list(result["memory"][0]["peak_mb"])
        part("Peak private memory, MB", "pairs", *names)
        lines += [_row(f"{r['pairs']:,}", *(f"{r['peak_mb'][name]:.0f}" for name in names)) for r in result["memory"]]
    if "workers" in result:
        found = result["workers"]
        one, two = (", ".join(f"{wall:.1f}" for wall in found["walls"][name]) for name in ("1", "2"))
        part("Workers")
        lines.append(f"{found['pairs']:,} pairs, wall seconds in turns: one worker {one}; two {two}.")
        lines.append(f"Two are {found['ratio']:.2f} times as fast (medians).")
    if "photos" in result:
        photo = result["photos"]
        part("Photographs")
        lines.append(
            f"JPEG 640 x 480 of {photo['bytes'] / 1000:.0f} kB through rules and hashes: {photo['us']:.0f} us."
        )
    if "similarity" in result:
        scores = result["similarity"]
        part("Similarity")
        lines.append(f"{scores['parameters'] / 1e6:.1f} million parameters, one core: {scores['us']:.0f} us a pair.")
    if "photos" in result and "stages" in result:
        us = {row["stage"]: row["us"] for row in result["stages"]}
        web = us["end to end"] - us[PICTURES] - us[SIGNATURES] + result["photos"]["us"]
        hours = web * WEB_PAIRS / 1e6 / 3600
        part("On paper: 6 billion pairs")
        lines.append(
            f"{web:.0f} us a pair with such photographs in place of the small pictures: {hours:,.0f} core-hours."
        )
    if "engine" in result:
        part("Engine")
        lines += [f"- {name}: {seconds:.2f} s" for name, seconds in result["engine"].items()]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def measure(
    *,
    sets: tuple[Path, ...] = (Path("data/emoji"), Path("data/scenes")),
    pairs: int = 200_000,
    worker_pairs: int = 100_000,
    turns: int = 2,
    parts: tuple[Part, ...] = ("quality", "memory", "workers", "photos", "similarity", "engine"),
    work: Path = Path("build/prepare"),
    out: Path = HERE / "results" / "prepare.json",
) -> None:
    """Measure the parts asked for; results of others stay as they are in the output file.

    Args:
        sets: data sets whose train splits the pictures and captions come from.
        pairs: raw pairs of the large input; the small one is a tenth.
        worker_pairs: pairs of the comparison of one and two workers.
        turns: turns of that comparison.
        parts: what to measure.
        work: folder for tars and outputs, about 12 kB a pair.
        out: results; a table of the same name ending in .md is written beside it.
    """
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    result["about"] = machine() | {
        "versions": ", ".join(f"{name} {version(name)}" for name in ("ray", "pyarrow", "pillow"))
    }
    work = work.resolve()
    if {"quality", "memory", "workers"} & set(parts):
        make_input(sets, work, pairs if {"quality", "memory"} & set(parts) else worker_pairs)
    if {"quality", "memory"} & set(parts):
        small = prepare(write_settings(work, work / "small", pairs // 10), 2)
        large = prepare(write_settings(work, work / "large", pairs), 2)
        result["memory"] = [
            {"pairs": count, "peak_mb": timing["peak_mb"], "command_s": timing["command_s"]}
            for count, timing in ((pairs // 10, small), (pairs, large))
        ]
        result["pairs"], result["stages"] = pairs, stages(large, pairs)
        result["quality"] = quality(work, work / "large", range(-(-pairs // PER_TAR)))
    if "workers" in parts:
        result["workers"] = compare_workers(work, worker_pairs, turns)
    if "photos" in parts:
        result["photos"] = photographs()
    if "similarity" in parts:
        result["similarity"] = similarity(sets)
    if "engine" in parts:
        result["engine"] = engine()
    publish(out, result, table(result))


if __name__ == "__main__":
    tyro.cli(measure, description=__doc__)
