"""m2_ds.train with a fault on rank 1 only (or M2_RANK), named by M2_FAULT: what a launcher starts in tests.

M2_ANOTHER names one of the other ranks.
"""

import ctypes
import os
import resource
import signal
import time
from typing import Any

from m2_ds import train
from m2_ds.engine import checkpoint, preflight
from m2_ds.engine.step import ContrastiveStep


def install(fault: str) -> None:
    step, write, check = ContrastiveStep.__call__, checkpoint._write, preflight.check
    done = 0

    def failing_step(self: ContrastiveStep, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == 3 and fault == "value":
            raise ValueError("slot 41: no usable pair in 11 tries")
        if done == 3 and fault == "crash":
            raise RuntimeError("something that nobody thought of")
        if done == 3 and fault == "hang":
            time.sleep(1000)
        if done == 3 and fault == "hold":  # Python's lock, so that no thread of it runs
            ctypes.PyDLL(None).sleep(1000)
        if done == 3 and fault in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, fault))
        return step(self, *arguments)

    def full_disk(*arguments: Any) -> Any:
        if fault == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return write(*arguments)

    def told(*arguments: Any) -> Any:
        if fault == "told at the start":
            os.kill(os.getpid(), signal.SIGTERM)
        return check(*arguments)

    ContrastiveStep.__call__ = failing_step  # type: ignore[method-assign]
    checkpoint._write = full_disk
    preflight.check = told


if __name__ == "__main__":
    mine = os.environ["RANK"] == os.environ.get("M2_RANK", "1")
    install(os.environ["M2_FAULT"] if mine else os.environ.get("M2_ANOTHER", ""))
    train.main()
