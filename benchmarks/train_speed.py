#!/usr/bin/env python
"""Training speed of m2_ds beside its peer open_clip, on this machine, in one run.

For fp32 and bf16, and for one process with all cores and one process a core, the two sides train in turns (peer, m2_ds,
peer, m2_ds): same data from disk, same global batch, same widths and depths, as many steps. Samples/s is what each
side's own log says of a step; the first steps are dropped and the median is taken over the rest of all turns. Beside it
stands this program's own clock: samples between the arrival of the log lines of the first and the last counted step.

    benchmarks/peer/setup.sh build/peer-venv
    python benchmarks/train_speed.py --peer-python build/peer-venv/bin/python --data DATASET --tokenizer FOLDER

Nothing else should run meanwhile: how busy the machine was before each turn is written down.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
import tables
import tyro
from peer import make_tars, model_folder

from m2_ds.launch import train_command

HERE = Path(__file__).resolve().parent
Side = Literal["peer", "m2_ds"]
Precision = Literal["fp32", "bf16"]
PEER_PRECISION: dict[Precision, str] = {"fp32": "fp32", "bf16": "amp_bf16"}
QUIET = 0.1  # share of the cores that other programs may use
PEER_LINE = re.compile(r"Train Epoch: .*Batch \(t\): [\d.]+, ([\d.e+]+)/s,")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    peer_python: Path
    """Python of the peer's environment (benchmarks/peer/setup.sh makes it)."""
    data: Path
    """Folder of a shards dataset; both sides train on its split."""
    tokenizer: Path
    """Tokenizer of the m2_ds side; the peer has its own."""
    recipe: Path = Path("ds_configs/recipes/bench_speed.yaml")
    """Recipe of the m2_ds side."""
    override: tuple[str, ...] = ()
    """More overrides for the recipe, ``name=value``."""
    split: str = "train"
    """Split to train on."""
    steps: int = 40
    """Optimizer steps of a turn."""
    warmup: int = 8
    """Steps at the start of a turn that are not counted."""
    turns: int = 2
    """Turns of each side in each precision and layout."""
    batch: int = 256
    """Pairs a step, over all processes."""
    workers: int = 1
    """Data workers a process, on both sides."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """Number formats to measure."""
    sides: tuple[Side, ...] = ("peer", "m2_ds")
    """Leave one out to look at the other alone."""
    layouts: tuple[str, ...] = ()
    """Processes x threads, such as ``1x2 2x1``; by default one process on all cores, and one process a core."""
    wait_quiet: float = 60.0
    """Seconds to wait at most for other programs to leave the cores, before each turn."""
    limit: float = 600.0
    """Seconds after which a turn is given up."""
    work: Path = Path("build/train_speed")
    """Folder for tars, logs and run folders."""
    out: Path = HERE / "results" / "train_speed.json"
    """Results; a table of the same name ending in .md is written beside it."""


@dataclass(frozen=True)
class Layout:
    """Processes and threads of each."""

    processes: int
    threads: int

    @staticmethod
    def parse(text: str) -> "Layout":
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        if not found or "0" in found.groups():
            raise ValueError(f"--layouts: {text!r} is not PROCESSESxTHREADS, such as 2x1")
        return Layout(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.processes}x{self.threads}"


@dataclass
class Turn:
    """One training run. Rates are samples/s."""

    side: Side
    precision: Precision
    layout: str
    turn: int
    busy_before: float  # share of the cores that other programs used
    median: float = 0.0
    clock: float = 0.0  # by this program's clock over all counted steps
    rates: list[float] = field(default_factory=list)  # of the counted steps, as the side's log says


def peer_rates(lines: Iterable[str]) -> list[float]:
    """Samples/s of the steps in an open_clip log written with ``--log-every-n-steps 1``."""
    return [float(found[1]) for line in lines if (found := PEER_LINE.search(line))]


def our_rates(lines: Iterable[str]) -> list[float]:
    """Samples/s of the logged steps in a run's log.jsonl; a last line that is still being written is left out."""
    return [float(json.loads(line)["samples_per_s"]) for line in lines if line.endswith("\n") and line.strip()]


def environment(threads: int) -> dict[str, str]:
    """This process's environment for a run on CPU with the given number of threads."""
    count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {**os.environ, **count, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def peer_command(
    options: Options, precision: Precision, layout: Layout, model: Path, tars: Path, run: Path
) -> list[str]:
    """open_clip's own training loop; several processes go through peer/launch.py."""
    start = [str(options.peer_python)]
    if layout.processes == 1:
        start += ["-m", "open_clip_train.main"]
    else:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.processes}", "--"]
        start += [str(HERE / "peer" / "launch.py"), "--local-loss", "--gather-with-grad"]
    last = max(int(path.stem) for path in tars.glob("*.tar"))
    return [
        *start,
        *("--model", f"local-dir:{model.resolve()}"),
        *("--train-data", f"{tars.resolve()}/{{00000..{last:05d}}}.tar", "--dataset-type", "webdataset"),
        *("--train-num-samples", str(options.steps * options.batch), "--epochs", "1"),
        *("--batch-size", str(options.batch // layout.processes), "--workers", str(options.workers)),
        *("--precision", PEER_PRECISION[precision], "--device", "cpu", "--warmup", "10", "--lr", "1e-3"),
        *("--logs", str(run.parent.resolve()), "--name", run.name, "--log-every-n-steps", "1"),
        *("--zeroshot-frequency", "0"),
    ]


def our_command(options: Options, precision: Precision, layout: Layout, run: Path) -> list[str]:
    """m2_ds under the deepspeed launcher."""
    overrides = {
        "folder": run,
        "tokenizer": options.tokenizer,
        "steps": options.steps,
        "global_batch": options.batch,
        "data.sources.0.path": options.data,
        "data.sources.0.split": options.split,
        "data.workers": options.workers,
        "engine.precision": precision,
        "engine.threads": layout.threads,
        "checkpoint.every": 0,
        "log.every": 1,
    }
    overrides_given = [*(f"{name}={value}" for name, value in overrides.items()), *options.override]
    return train_command(options.recipe, layout.processes, overrides_given)


def watch(command: Sequence[str], threads: int, log: Path, output: Path, limit: float) -> list[float]:
    """Runs a command to its end; returns when each line of its log arrived, in seconds of this program's clock.

    Raises ValueError with the end of its output where it fails or takes longer than ``limit`` seconds.
    """
    arrivals: list[float] = []
    read = 0
    end = time.perf_counter() + limit
    with output.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=environment(threads), start_new_session=True
        )
        try:
            running = True
            while running:
                running = process.poll() is None
                if log.is_file() and log.stat().st_size > read:
                    new = log.read_bytes()[read:]
                    read += len(new)
                    arrivals += [time.perf_counter()] * new.count(b"\n")
                if time.perf_counter() > end:
                    raise ValueError(
                        f"a turn took longer than --limit {limit:.0f} s: ask for fewer --steps\n{tail(output)}"
                    )
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # the launcher and its workers: a session of their own
                process.wait(timeout=30)
    if process.returncode:
        raise ValueError(f"a turn failed with exit status {process.returncode}; the end of {output}:\n{tail(output)}")
    return arrivals


def tail(path: Path, lines: int = 25) -> str:
    """The last lines of a text file."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def count(turn: Turn, lines: Sequence[str], arrivals: Sequence[float], options: Options) -> Turn:
    """Fills in the rates of a turn from its log's lines and their arrival times."""
    parse = peer_rates if turn.side == "peer" else our_rates
    rates = parse(lines)
    times = [moment for line, moment in zip(lines, arrivals) if parse([line])]
    if len(rates) < options.warmup + 3 or len(times) != len(rates):
        raise ValueError(f"{turn.side}: its log tells of {len(rates)} steps, {options.warmup} are warm-up: add --steps")
    turn.rates = [round(rate, 2) for rate in rates[options.warmup :]]
    turn.median = round(statistics.median(turn.rates), 2)
    turn.clock = round((len(times) - options.warmup) * options.batch / (times[-1] - times[options.warmup - 1]), 2)
    return turn


def busy(seconds: float = 2.0) -> float:
    """Share of this machine's cores in use, 0 to 1."""
    return psutil.cpu_percent(interval=seconds) / 100


def wait_for_quiet(limit: float, threshold: float = QUIET) -> float:
    """Waits until little else runs or ``limit`` seconds have passed; returns the share of the cores then in use."""
    end = time.monotonic() + limit
    while (share := busy()) > threshold and time.monotonic() < end:
        pass
    return round(share, 3)


def summarise(turns: Sequence[Turn]) -> list[dict[str, object]]:
    """By precision: each side's median in each layout, its best layout, and m2_ds over the peer at their best."""
    rows: list[dict[str, object]] = []
    for precision in dict.fromkeys(turn.precision for turn in turns):
        row: dict[str, object] = {"precision": precision}
        best: dict[str, float] = {}
        for side in dict.fromkeys(turn.side for turn in turns):
            mine = [turn for turn in turns if (turn.side, turn.precision) == (side, precision)]
            layouts: dict[str, dict[str, Any]] = {
                layout: {
                    "samples_per_s": statistics.median([r for t in mine if t.layout == layout for r in t.rates]),
                    "turns": [t.median for t in mine if t.layout == layout],
                    "clock": [t.clock for t in mine if t.layout == layout],
                }
                for layout in dict.fromkeys(turn.layout for turn in mine)
            }
            chosen = max(layouts, key=lambda layout: layouts[layout]["samples_per_s"])
            best[side] = layouts[chosen]["samples_per_s"]
            row[side] = {"best": chosen, "samples_per_s": best[side], "layouts": layouts}
        if len(best) == 2:
            row["ratio"] = round(best["m2_ds"] / best["peer"], 3)
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, object]], about: Mapping[str, object]) -> str:
    """The summary in Markdown."""
    lines = [
        "# Training speed, m2_ds beside open_clip",
        "",
        f"{about['cpu']}, {about['cores']} cores; {about['date']}. Batch {about['batch']}, "
        f"{about['counted']} counted steps a turn, the sides in turns. Medians of samples/s; then each turn's median / "
        "its rate by an outer clock.",
        "",
        "| precision | side | processes x threads | samples/s | turns | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for side in ("peer", "m2_ds"):
            cells = row.get(side)
            if not isinstance(cells, dict):
                continue
            for layout, cell in cells["layouts"].items():
                each = ", ".join(f"{a:.0f} / {b:.0f}" for a, b in zip(cell["turns"], cell["clock"]))
                each += " | best" if layout == cells["best"] else " | "
                lines.append(f"| {row['precision']} | {side} | {layout} | {cell['samples_per_s']:.0f} | {each} |")
        if "ratio" in row:
            lines.append(f"| **{row['precision']}** | **m2_ds / peer** | best of each | **{row['ratio']:.2f} x** | | |")
    return "\n".join(lines) + "\n"


def machine(options: Options) -> dict[str, object]:
    """What the numbers were taken on and with."""
    asked = (
        "import torch, open_clip; m = open_clip.create_model('local-dir:{}'); "
        "print(torch.__version__, open_clip.__version__, sum(p.numel() for p in m.parameters()))"
    )
    peer: list[str] = []
    if "peer" in options.sides:
        folder = (options.work / "model").resolve()
        found_by_peer = subprocess.run(
            [str(options.peer_python), "-c", asked.format(folder)], check=True, capture_output=True, text=True
        )
        peer = found_by_peer.stdout.split()
    return tables.machine() | {
        "batch": options.batch,
        "counted": options.steps - options.warmup,
        "warmup": options.warmup,
        "workers": options.workers,
        "recipe": options.recipe.name,
        "override": list(options.override),
        "m2_ds": {"torch": version("torch"), "deepspeed": version("deepspeed")},
        "peer": dict(zip(("torch", "open_clip", "parameters"), peer)),
    }


def main(options: Options) -> None:
    """Runs every turn, prints the table and writes it with all numbers."""
    cores = len(os.sched_getaffinity(0))
    layouts = [Layout.parse(text) for text in options.layouts or (f"1x{cores}", f"{cores}x1")]
    for layout in layouts:
        if options.batch % layout.processes:
            raise ValueError(f"--batch {options.batch} does not divide over {layout.processes} processes")
    if not 0 < options.warmup < options.steps - 2:
        raise ValueError(
            f"--warmup {options.warmup} must be at least 1 and leave some of {options.steps} steps to count"
        )
    if "peer" in options.sides and not options.peer_python.is_file():
        raise ValueError(f"no {options.peer_python}: make it with benchmarks/peer/setup.sh FOLDER")
    model = model_folder.write(options.work / "model")
    shards = max(8, options.workers * max(layout.processes for layout in layouts))
    tars = make_tars.write(options.data, options.work / f"tars-{options.split}", options.split, shards)
    about = machine(options)
    runs = options.work / "runs"
    plan: list[tuple[Precision, Layout, int, Side]] = [
        (precision, layout, number, side)
        for precision in options.precisions
        for layout in layouts
        for number in range(options.turns)
        for side in options.sides
    ]
    turns: list[Turn] = []
    for done, (precision, layout, number, side) in enumerate(plan):
        run = runs / f"{side}-{precision}-{layout}-{number}"
        shutil.rmtree(run, ignore_errors=True)
        runs.mkdir(parents=True, exist_ok=True)
        turn = Turn(side, precision, str(layout), number, wait_for_quiet(options.wait_quiet))
        if side == "peer":
            command = peer_command(options, precision, layout, model, tars, run)
            log = run / "out.log"
        else:
            command, log = our_command(options, precision, layout, run), run / "log.jsonl"
        arrivals = watch(command, layout.threads, log, runs / f"{run.name}.txt", options.limit)
        with log.open(encoding="utf-8") as lines:
            turns.append(count(turn, list(lines), arrivals, options))
        warning = f"  the machine was {turn.busy_before:.0%} busy before" if turn.busy_before > QUIET else ""
        print(
            f"{done + 1}/{len(plan)} {side:5} {precision} {layout}: {turn.median:.0f} samples/s "
            f"(outer clock {turn.clock:.0f}){warning}",
            flush=True,
        )
    rows = summarise(turns)
    result = {"about": about, "summary": rows, "turns": [asdict(turn) for turn in turns]}
    text = table(rows, about)
    disturbed = sum(turn.busy_before > QUIET for turn in turns)
    if disturbed:
        text += f"\nOther programs were running before {disturbed} of {len(turns)} turns: do not trust these numbers.\n"
    tables.publish(options.out, result, text)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        sys.exit(f"train_speed: {error}")
