"""One rank of benchmarks/checkpoints.py: a run whose steps and what lies between them are timed.

Arguments: the recipe, then overrides. Rank 0 prints one JSON line: seconds of every step, of what came between steps at
each checkpoint, and from the end of the first step until all was on disk.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from m2_ds.config import load_config
from m2_ds.engine.saving import Saving
from m2_ds.engine.step import ContrastiveStep
from m2_ds.train import train


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    steps: list[float] = []
    stalls: list[float] = []
    began = 0.0
    step, save, leave = ContrastiveStep.__call__, Saving.save, Saving.__exit__

    def timed_step(self: ContrastiveStep, *given: Any) -> Any:
        nonlocal began
        started = time.perf_counter()
        result = step(self, *given)
        steps.append(time.perf_counter() - started)
        began = began or time.perf_counter()
        return result

    def timed_save(self: Saving, number: int, stream: Any, anomalies: Any, last: bool) -> None:
        started = time.perf_counter()
        save(self, number, stream, anomalies, False)  # the wait at the end is no part of the stall
        stalls.append(time.perf_counter() - started)

    def timed_leave(self: Saving, *given: Any) -> None:
        leave(self, *given)
        if self.mesh.is_first:
            found = {"steps": steps, "stalls": stalls, "loop": time.perf_counter() - began}
            print(f"FOUND {json.dumps(found)}", flush=True)

    ContrastiveStep.__call__ = timed_step  # type: ignore[method-assign]
    Saving.save, Saving.__exit__ = timed_save, timed_leave  # type: ignore[method-assign]
    train(load_config(Path(arguments[0]), arguments[1:]))


if __name__ == "__main__":
    main()
