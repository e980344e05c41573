"""The ranks of one node, where nothing else starts them:  python -m m2_ds.cluster.node --node 0 --nodes 4 --ranks 8 ...

torchrun ends with 1 whatever its ranks ended with, and the deepspeed launcher ends its ranks on a signal instead of
passing it on. Here the exit code of a rank is that of the node, and SIGTERM and SIGUSR1 reach the ranks, which can then
write a checkpoint.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

POLL_S, KILL_S = 0.1, 10.0


def run_node(command: Sequence[str], node: int, nodes: int, ranks: int, grace_s: float) -> int:
    """The exit code of ``ranks`` ranks that run ``command``: of the first that ended badly; 128 + signal if killed.

    ``grace_s``: when one has ended badly, the others have this long to end by themselves.
    """
    processes = [
        subprocess.Popen(
            command,
            env={
                **os.environ, "RANK": str(node * ranks + local), "LOCAL_RANK": str(local), "GROUP_RANK": str(node),
                "WORLD_SIZE": str(nodes * ranks), "LOCAL_WORLD_SIZE": str(ranks),
            },
        )
        for local in range(ranks)
    ]  # fmt: skip

    def forward(number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)  # does nothing where it has ended

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        return _first_bad(processes, grace_s)
    finally:
        for process in processes:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_bad(processes: list[subprocess.Popen[bytes]], grace_s: float) -> int:
    code, deadline, stopping = 0, None, False
    while any(process.poll() is None for process in processes):
        time.sleep(POLL_S)
        code = code or _worst(processes)
        now = time.monotonic()
        if code and deadline is None:
            deadline = now + grace_s
        if deadline is not None and now > deadline:
            for process in processes:
                process.kill() if stopping else process.terminate()
            stopping, deadline = True, now + KILL_S
    code = code or _worst(processes)
    return code if code >= 0 else 128 - code


def _worst(processes: list[subprocess.Popen[bytes]]) -> int:
    return next((code for process in processes if (code := process.poll())), 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="m2_ds.cluster.node", description="Start the ranks of this node.")
    parser.add_argument("--node", type=int, required=True, help="its number, from 0")
    parser.add_argument("--nodes", type=int, required=True, help="how many there are")
    parser.add_argument("--ranks", type=int, required=True, help="ranks a node")
    parser.add_argument(
        "--grace", type=float, default=120.0, help="seconds that ranks have to end after one has failed"
    )
    parser.add_argument("module", help="e.g. m2_ds.train")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="its own options")
    given = parser.parse_args(arguments)
    if not 0 <= given.node < given.nodes or given.ranks < 1:
        parser.error(f"--node {given.node} of --nodes {given.nodes}, --ranks {given.ranks}: there is no such node")
    command = [sys.executable, "-m", given.module, *given.options]
    return run_node(command, given.node, given.nodes, given.ranks, given.grace)


if __name__ == "__main__":
    sys.exit(main())
