#!/usr/bin/env python
"""Time and memory of the contrastive loss, forward and backward, beside open_clip's ClipLoss, on this machine.

For every batch size each side runs in a process of its own, in turns: unit vectors of width 512 in fp32, a warm-up and
then the given number of passes from features to their gradients. Extra memory is the resident set's peak above
where it stood with the features made (Linux: VmHWM, reset before the passes).

    benchmarks/peer/setup.sh build/peer-venv
    python benchmarks/contrastive_loss.py --peer-python build/peer-venv/bin/python

Sizes above --peer-limit are run by m2_ds alone (the peer's matrices would not fit).
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tables import cpu, publish

HERE = Path(__file__).resolve().parent
WIDTH = 512
Side = Literal["peer", "m2_ds"]


@dataclass(frozen=True)
class Options:
    """What to measure."""

    peer_python: Path | None = None
    """Python of the peer's environment (benchmarks/peer/setup.sh makes it); without it m2_ds runs alone."""
    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Contrastive batches."""
    peer_limit: int = 16384
    """Largest batch that the peer is given."""
    turns: int = 3
    """Processes of each side and size, in turns."""
    passes: int = 2
    """Counted passes a process."""
    warmup: int = 1
    """Passes before them."""
    threads: int = os.cpu_count() or 1
    """Threads of a process."""
    out: Path = HERE / "results" / "contrastive_loss.json"
    """Results; a table of the same name ending in .md is written beside it."""


@dataclass(frozen=True)
class Turn:
    side: Side
    size: int
    seconds: list[float]
    extra_mib: float


def work(side: str, size: int, passes: int, warmup: int, threads: int) -> None:
    """Inside a process of one side: print the turn as JSON."""
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    image = F.normalize(torch.randn(size, WIDTH), dim=-1)
    text = F.normalize(torch.randn(size, WIDTH) + image, dim=-1)
    if side == "peer":
        from open_clip.loss import ClipLoss

        loss = ClipLoss()
        leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(50.0, requires_grad=True)]

        def once() -> None:
            torch.autograd.grad(loss(*leaves), leaves)
    else:
        from m2_ds.loss.config import LossConfig
        from m2_ds.loss.contrastive import Level, exchange_and_compare
        from m2_ds.parallel.mesh import SOLO

        level, ids, config = Level(torch.tensor([50.0]).log()), torch.arange(size), LossConfig(repeats="negative")

        def once() -> None:
            exchange_and_compare([image, text], [level], ids, SOLO, config)

    torch.mm(image[:256], text[:256].T)  # starts the threads
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    seconds = []
    for number in range(warmup + passes):
        started = time.perf_counter()
        once()
        if number >= warmup:
            seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds, "extra_mib": (_status("VmHWM") - before) / 1024}))


def _status(field: str) -> int:
    """kB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def turn(options: Options, side: Side, size: int) -> Turn:
    python = options.peer_python if side == "peer" else sys.executable
    command = [str(python), __file__, "work", side, str(size), str(options.passes), str(options.warmup)]
    command.append(str(options.threads))
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Turn(side, size, **json.loads(found.stdout.splitlines()[-1]))


def table(turns: list[Turn], head: str) -> str:
    lines = ["# The contrastive loss, m2_ds beside open_clip", "", head, ""]
    lines += ["| batch | open_clip s | MiB | m2_ds s | MiB | time | memory |", "|---|---|---|---|---|---|---|"]
    for size in dict.fromkeys(t.size for t in turns):
        cells: dict[str, tuple[float, float]] = {}
        for side in ("peer", "m2_ds"):
            mine = [t for t in turns if t.size == size and t.side == side]
            if mine:
                seconds = statistics.median(s for t in mine for s in t.seconds)
                cells[side] = (seconds, statistics.median(t.extra_mib for t in mine))
        ours = cells["m2_ds"]
        peer = cells.get("peer")
        shown = f"{peer[0]:.2f} | {peer[1]:.0f}" if peer else "- | -"
        ratios = f"{ours[0] / peer[0]:.2f} x | {ours[1] / peer[1]:.3f} x" if peer else "- | -"
        lines.append(f"| {size:,} | {shown} | {ours[0]:.2f} | {ours[1]:.0f} | {ratios} |")
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    turns: list[Turn] = []
    for size in options.sizes:
        sides: list[Side] = ["peer"] if options.peer_python and size <= options.peer_limit else []
        for number in range(options.turns):
            for side in [*sides, "m2_ds"]:
                turns.append(turn(options, side, size))
                last = turns[-1]
                print(f"B {size} turn {number + 1} {side}: {min(last.seconds):.2f} s, {last.extra_mib:.0f} MiB extra")
    head = (
        f"{cpu()}, {options.threads} threads; {time.strftime('%Y-%m-%d')}. fp32, width {WIDTH}, one process, "
        f"forward and backward; medians of {options.turns} x {options.passes} passes, the sides in turns."
    )
    publish(options.out, {"head": head, "turns": [asdict(t) for t in turns]}, table(turns, head))


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2], *(int(x) for x in sys.argv[3:7]))
    else:
        import tyro

        main(tyro.cli(Options, description=__doc__))
