"""One rank of benchmarks/planner.py: steps of real engines, timed, or their peak of memory.

Started with "time" or "memory" and jobs as JSON; rank 0 prints a line a job, what all ranks found.
"""

import json
import sys
from typing import Any

import torch

from m2_ds.config import RunConfig
from m2_ds.engine.setup import quiet, set_threads
from m2_ds.parallel.collectives import all_gather_objects
from m2_ds.parallel.mesh import Mesh
from m2_ds.plan.trial import Clock, ResidentPeak, Trial, trial_tree

SMALL = trial_tree({"preset": "test"}, "zero1", 8, 2, "fp32")


def peak(config: RunConfig, mesh: Mesh, lengths: tuple[int, int]) -> int:
    """Bytes of steps 2 and 3 beyond what is there when the libraries have run a small model's step."""
    small = Trial(RunConfig.model_validate(SMALL), mesh.with_layout(RunConfig.model_validate(SMALL).parallel), lengths)
    small.run(1)
    small.close()
    del small
    resident = ResidentPeak()
    trial = Trial(config, mesh.with_layout(config.parallel), lengths)
    trial.run(1)  # in the first step the optimizer makes its state
    resident.forget()
    trial.run(2)
    return resident.peak()


def seconds(config: RunConfig, mesh: Mesh, lengths: tuple[int, int], steps: int, clock: Clock) -> float:
    trial = Trial(config, mesh.with_layout(config.parallel), lengths, clock)
    found = trial.median(steps)["total"]
    trial.close()
    return found


def work(what: str, jobs: list[dict[str, Any]], steps: int, clock: Clock) -> None:
    quiet()
    mesh = Mesh.start()
    for job in jobs:
        config = RunConfig.model_validate(job["tree"])
        set_threads(config)
        if clock == "cpu":
            torch.set_num_threads(1)
        torch.manual_seed(0)
        lengths = (job["lengths"][0], job["lengths"][1])
        found = peak(config, mesh, lengths) if what == "memory" else seconds(config, mesh, lengths, steps, clock)
        everyone = all_gather_objects(found, mesh.world)
        if mesh.is_first:
            print(json.dumps(everyone), flush=True)
    mesh.stop()


if __name__ == "__main__":
    work(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), "cpu" if sys.argv[4] == "cpu" else "wall")
