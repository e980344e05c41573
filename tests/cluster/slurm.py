"""A Slurm that is just enough: reads a batch script's options, runs it, sends it its signal, and requeues it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COMMANDS = Path(__file__).with_name("slurm_commands.py")


@dataclass
class Outcome:
    """Exit codes of all starts of a job, and what they printed."""

    codes: list[int] = field(default_factory=list)
    output: str = ""


def directives(script: str) -> dict[str, str]:
    """The options of sbatch in a script; those after its first command do not count, as in Slurm."""
    found = {}
    for text in script.splitlines():
        if text.startswith("#SBATCH "):
            name, _, value = text.removeprefix("#SBATCH --").partition("=")
            found[name] = value
        elif text.strip() and not text.startswith("#"):
            break
    return found


def sbatch(
    script: Path,
    folder: Path,
    nodes: Sequence[str],
    *,
    namespaces: Sequence[str] = (),
    signal_when: Callable[[int], bool] = lambda start: False,
    seconds: float = 60.0,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run a batch script as often as it requeues itself. ``signal_when(start)`` is asked until it is time for SIGUSR1.

    ``nodes``: addresses; ``namespaces``: network namespaces of theirs.
    """
    commands = folder / "bin"
    commands.mkdir(parents=True, exist_ok=True)
    for name in ("srun", "scontrol"):
        (commands / name).unlink(missing_ok=True)
        (commands / name).symlink_to(COMMANDS)
    options = directives(script.read_text())
    asked = re.fullmatch(r"B:USR1@(\d+)", options["signal"])
    assert asked and int(options["nodes"]) == len(nodes) and "requeue" in options
    settings = {
        **os.environ, **(environment or {}), "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PRETENDED_NODES": " ".join(nodes), "PRETENDED_NAMESPACES": " ".join(namespaces),
        "PRETENDED_FOLDER": str(folder), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
    }  # fmt: skip
    inside = ["ip", "netns", "exec", namespaces[0]] if namespaces else []
    outcome, deadline = Outcome(), time.monotonic() + seconds
    while True:
        (folder / "requeued").unlink(missing_ok=True)
        start = len(outcome.codes)
        log = folder / f"output-{start}.log"
        with log.open("wb") as out:
            batch = subprocess.Popen(
                [*inside, "bash", str(script)], env={**settings, "SLURM_RESTART_COUNT": str(start)},
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                sent = False
                while batch.poll() is None:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"start {start} of {script} takes too long:\n{log.read_text()}")
                    if not sent and signal_when(start):
                        batch.send_signal(signal.SIGUSR1)  # to the script alone: that is what B: asks for
                        sent = True
                    time.sleep(0.05)
            finally:
                if batch.poll() is None:
                    os.killpg(batch.pid, signal.SIGKILL)
        outcome.codes.append(batch.returncode)
        outcome.output += log.read_text()
        if not (folder / "requeued").exists():
            return outcome
