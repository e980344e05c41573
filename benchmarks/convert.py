#!/usr/bin/env python
"""`m2 convert` of a checkpoint of a released size beside `cp` of the same bytes: seconds and peak memory.

    python benchmarks/convert.py --preset 10b --folder /fast/disk --rounds 3

The checkpoint is `convert_source.py`'s: random fp16 numbers in the shapes of the preset, in the release's layout. Both
sides start with it out of the page cache and end when everything is on disk, and take turns. Needs twice its size
(10b: 41 GB) in FOLDER, and removes what it wrote.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from tables import machine, publish

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Turn:
    side: str
    seconds: float
    peak_mb: float
    cpu_s: float


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def run(side: str, command: list[str], source: Path, out: Path) -> Turn:
    """One process, and the sync after it; what it wrote is removed."""
    os.sync()
    forget(source)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    turn = Turn(side, seconds, usage.ru_maxrss / 1e3, usage.ru_utime + usage.ru_stime)
    print(f"{side}: {seconds:.1f} s, {turn.peak_mb:,.0f} MB, {turn.cpu_s:.1f} s of CPU", file=sys.stderr, flush=True)
    return turn


def measure(
    preset: str = "10b",
    folder: Path = Path("convert-benchmark"),
    rounds: int = 3,
    out: Path = HERE / "results",
) -> None:
    """Compare, and put the preset's rows into OUT/convert.json and OUT/convert.md.

    Args:
        preset: released size.
        folder: where to write; on the disk that is to be measured.
        rounds: turns of each side.
        out: folder of the results.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        generator = [sys.executable, str(HERE / "convert_source.py"), "--preset", preset, "--folder", str(folder)]
        subprocess.run(generator, check=True)
        source = folder / "m2.ckpt"
        size = source.stat().st_size
        convert, copy = folder / "converted", folder / "copy.ckpt"
        m2 = [sys.executable, "-m", "m2_ds.cli", "convert", str(source), str(convert)]
        turns = []
        for _ in range(rounds):
            turns.append(run("m2 convert", m2, source, convert))
            turns.append(run("cp", ["cp", str(source), str(copy)], source, copy))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    path = out / "convert.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[preset] = machine() | {
        "bytes": size,
        "load": os.getloadavg()[2],
        "turns": [asdict(turn) for turn in turns],
    }
    publish(path, rows, table(rows))


def table(rows: dict[str, dict]) -> str:
    """Of all presets measured so far."""
    lines = [
        "# `m2 convert` beside `cp` of the same bytes",
        "",
        "`python benchmarks/convert.py --preset P --folder DIR`. A generated fp16 .ckpt (Lightning layout) to the",
        "canonical folder, checksums taken on the way. Source not in the page cache; time until all is on disk; turns",
        "alternate. Memory: the process's largest resident set; load: others on the machine, mean of 15 minutes.",
        "",
        "| preset | GB | side | seconds (median) | turns | times cp | peak memory | CPU seconds | CPUs, load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for preset, row in rows.items():
        sides = {s: [turn for turn in row["turns"] if turn["side"] == s] for s in ("cp", "m2 convert")}
        base = statistics.median(turn["seconds"] for turn in sides["cp"])
        for side, turns in sides.items():
            seconds = [turn["seconds"] for turn in turns]
            median = statistics.median(seconds)
            peak = max(turn["peak_mb"] for turn in turns)
            cpu = statistics.median(turn["cpu_s"] for turn in turns)
            lines.append(
                f"| {preset} | {row['bytes'] / 1e9:.2f} | {side} | {median:.1f} | "
                f"{', '.join(f'{x:.1f}' for x in seconds)} | {median / base:.2f} | {peak:,.0f} MB | {cpu:.1f} | "
                f"{row['cpus']}, {row['load']:.1f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(measure)
