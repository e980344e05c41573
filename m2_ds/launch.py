"""Starting jobs on this machine through the deepspeed launcher, as a user would type it."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from m2_ds.config import load_config
from m2_ds.restarts import supervise


def ranks_of_this_machine() -> int:
    """One rank a GPU; without one, one rank a core (two single-thread ranks beat one rank of two threads)."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def train_command(recipe: Path, ranks: int, overrides: Sequence[str]) -> list[str]:
    return [*_launcher(ranks), "--module", "m2_ds.train", "--config", str(recipe), *overrides]


def train(recipe: Path, ranks: int | None, overrides: Sequence[str], restarts: int = 0) -> int:
    """Run the job to its end, and up to ``restarts`` times again where that helps; returns its exit code.

    ``ranks`` None: as many as this machine is good for.
    """
    config = load_config(recipe, overrides)

    def start(environment: dict[str, str]) -> tuple[int, bool]:
        return _run(train_command(recipe, ranks or ranks_of_this_machine(), overrides), environment)

    return supervise(start, config.folder, config.steps, restarts)


def evaluate(request: Path, ranks: int) -> int:
    """Carry out a request of `m2_ds.evaluate` on several ranks; returns the exit code."""
    return _start([*_launcher(ranks), "--no_local_rank", "--module", "m2_ds.evaluate", str(request)])


def doctor(recipe: Path | None, ranks: int, overrides: Sequence[str], report: Path) -> tuple[int, str]:
    """Let ``ranks`` of this machine examine themselves: exit code and output; the ``report`` (JSON) is in the file."""
    target = ["--module", "m2_ds.doctor", "--silent", "--json", str(report), *_recipe(recipe), *overrides]
    done = subprocess.run(
        [*_launcher(ranks), *target],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def doctor_on(hostfile: Path, recipe: Path | None, overrides: Sequence[str], outputs: Sequence[str]) -> int:
    """The same on the machines of a hostfile; the first of their ranks prints the page. Returns the exit code."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    return _start([*command, "--module", "m2_ds.doctor", *outputs, *_recipe(recipe), *overrides])


def _recipe(path: Path | None) -> list[str]:
    return [] if path is None else ["--config", str(path)]


def _launcher(ranks: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port)]


def _start(command: list[str]) -> int:
    return _run(command, {})[0]


def _run(command: list[str], more: dict[str, str]) -> tuple[int, bool]:
    """Run the launcher; its exit code, and whether it was told to end.

    Signals to end go to the ranks themselves, as SIGUSR1: the launcher would kill them soon.
    """
    print("$", shlex.join(["deepspeed", *command[3:]]), flush=True)
    process, told = subprocess.Popen(command, env=_environment() | more), False

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal told
        told = True
        ranks = _ranks(process.pid)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.send_signal(signal.SIGUSR1)
        if not ranks:
            process.terminate()

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return process.wait(), told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ranks(launcher: int) -> list[psutil.Process]:
    """The processes that deepspeed's launcher of this machine has started; none yet, or a launcher of several."""
    try:
        inside = psutil.Process(launcher).children(recursive=True)
        starters = [p for p in inside if "deepspeed.launcher.launch" in " ".join(p.cmdline())]
        return [rank for starter in starters for rank in starter.children()]
    except psutil.Error:
        return []


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", "1")  # engine.threads sets torch's own
    if no_gpu():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()
