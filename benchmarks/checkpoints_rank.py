"""One rank of benchmarks/checkpoints.py: checkpoints written both ways in turns, with steps of training between them.

Arguments: turns, steps behind each checkpoint, the recipe, then overrides. Rank 0 prints one JSON line: for every turn
and way the seconds that the checkpoint held up training, those of the steps behind it, and those until all was on disk.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from m2_ds.config import load_config
from m2_ds.engine.saving import Saving
from m2_ds.engine.step import ContrastiveStep
from m2_ds.parallel.collectives import barrier
from m2_ds.train import train

WAYS = ("none", "at once", "beside training")


def main() -> None:
    turns, behind, recipe, *overrides = [x for x in sys.argv[1:] if not x.startswith("--local_rank")]
    newest: list[Any] = []
    step, save = ContrastiveStep.__call__, Saving.save

    def kept_step(self: ContrastiveStep, *given: Any) -> Any:
        newest[:] = [self, *given]
        return step(self, *given)

    def measured(self: Saving, number: int, stream: Any, anomalies: Any, last: bool) -> None:
        """Of the run's one checkpoint, behind its last step, when the optimizer has its state."""
        found = []
        savings = {}
        for way in WAYS[1:]:
            block = self.config.checkpoint.model_copy(update={"asynchronous": way == WAYS[2]})
            config = self.config.model_copy(update={"checkpoint": block})
            savings[way] = Saving(self.engine, self.model, config, self.tokenizer, self.mesh, has_one=False)
        for turn in range(int(turns)):
            for way in WAYS:
                barrier(self.mesh.world)
                started = time.perf_counter()
                if way in savings:
                    save(savings[way], number + 1 + len(found), stream, anomalies, False)
                barrier(self.mesh.world)
                stall = time.perf_counter() - started
                for _ in range(int(behind)):
                    step(*newest)
                barrier(self.mesh.world)
                steps = time.perf_counter() - started - stall
                if way in savings:
                    savings[way].wait()
                barrier(self.mesh.world)
                whole = time.perf_counter() - started
                found.append({"turn": turn, "way": way, "stall": stall, "steps": steps, "whole": whole})
        if self.mesh.is_first:
            print(f"FOUND {json.dumps(found)}", flush=True)

    ContrastiveStep.__call__ = kept_step  # type: ignore[method-assign]
    Saving.save = measured  # type: ignore[method-assign]
    train(load_config(Path(recipe), overrides))


if __name__ == "__main__":
    main()
