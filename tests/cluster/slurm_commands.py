#!/usr/bin/env python3
"""srun and scontrol as far as the batch script uses them: nodes are network namespaces, or all this machine.

Called by the name of the command. PRETENDED_NODES: addresses of the nodes; PRETENDED_NAMESPACES: theirs, if they have
some; PRETENDED_FOLDER: where what was asked for is written.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

NODES = os.environ["PRETENDED_NODES"].split()
NAMESPACES = os.environ.get("PRETENDED_NAMESPACES", "").split()
FOLDER = Path(os.environ["PRETENDED_FOLDER"])


def srun(arguments: list[str]) -> int:
    """The highest exit code of all tasks, 128 + signal for one that was killed; signals go to every task."""
    options = {}
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).partition("=")
        options[name] = value
    assert options["--kill-on-bad-exit"] == "0", "the highest exit code would be that of the killing"
    local = int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for node in range(len(NODES)):
        inside = ["ip", "netns", "exec", NAMESPACES[node]] if NAMESPACES else []
        for number in range(local):
            place = {"SLURM_PROCID": node * local + number, "SLURM_LOCALID": number, "SLURM_NODEID": node}
            environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
            tasks.append(subprocess.Popen([*inside, *arguments], env=environment))

    def forward(number: int, _: object) -> None:
        for task in tasks:
            task.send_signal(number)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, forward)
    deadline = None
    while any(task.poll() is None for task in tasks):
        time.sleep(0.05)
        if deadline is None and any(task.poll() is not None for task in tasks):
            deadline = time.monotonic() + float(options["--wait"])
        if deadline is not None and time.monotonic() > deadline:
            for task in tasks:
                task.kill()
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        assert arguments[2] == os.environ["SLURM_JOB_NODELIST"]
        print(*NODES, sep="\n")
        return 0
    assert arguments == ["requeue", os.environ["SLURM_JOB_ID"]]
    (FOLDER / "requeued").touch()
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[Path(sys.argv[0]).name](sys.argv[1:]))
