"""The training loop: batches in, updates out, and what happens between them."""

import logging
import time
from collections.abc import Callable
from typing import Any

from m2_ds.config import RunConfig
from m2_ds.convert.run_folder import CHECKPOINTS
from m2_ds.data.stream import build_loader
from m2_ds.data.text import Tokenizer
from m2_ds.engine import checkpoint
from m2_ds.engine.monitor import Monitor
from m2_ds.engine.step import ContrastiveStep
from m2_ds.files import write_json
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)

Evaluate = Callable[[Any], dict[str, float]]


class Trainer:
    """Trains from the newest good checkpoint of the run folder (or from the start) to the last step."""

    def __init__(self, engine: Any, config: RunConfig, mesh: Mesh, tokenizer: Tokenizer, evaluate: Evaluate) -> None:
        self.engine, self.config, self.mesh, self.tokenizer, self.evaluate = engine, config, mesh, tokenizer, evaluate
        self.languages = list(config.data.languages)
        self.step = ContrastiveStep(engine, config, mesh, len(self.languages))
        self.checkpoints = config.folder / CHECKPOINTS

    def run(self) -> None:
        config, mesh = self.config, self.mesh
        start = self._resume()
        loader = build_loader(
            config.data,
            self.tokenizer,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch(mesh.data_parallel.size),
            seed=config.seed,
            start_step=start,
            rank=mesh.data_parallel.rank,
            world_size=mesh.data_parallel.size,
        )
        batches = iter(loader)
        with Monitor(config, mesh, self.step.level_names, self.languages, start) as monitor:
            self.engine.train()
            for step in range(start, config.steps):
                asked = time.perf_counter()
                batch = next(batches).to(mesh.device)
                waited = time.perf_counter() - asked
                monitor.add(step, batch, self.step(batch), waited)
                paused = time.perf_counter()
                self._between(step + 1, monitor)
                monitor.pause(time.perf_counter() - paused)

    def _resume(self) -> int:
        found = checkpoint.find(self.checkpoints, self.mesh)
        if found is None:
            return 0
        start = checkpoint.restore(self.engine, found, self.config, self.mesh)
        log.info("going on from %s", found)
        return start

    def _between(self, done: int, monitor: Monitor) -> None:
        """Checkpoint and evaluation, where step number ``done`` (from 1) calls for them."""
        config, last = self.config, done == self.config.steps
        if last or (config.checkpoint.every and done % config.checkpoint.every == 0):
            path = checkpoint.save(self.engine, self.checkpoints, done, config, self.tokenizer, self.mesh)
            log.info("checkpoint %s", path)
        every = config.evaluation.every
        if config.evaluation.tasks and (last or (every and done % every == 0)):
            self.engine.eval()
            results = self.evaluate(self.engine.module)
            self.engine.train()
            if self.mesh.is_first:
                folder = config.folder / "evaluation"
                folder.mkdir(exist_ok=True)
                write_json(folder / f"step-{done:08}.json", {"step": done, "metrics": results})
                monitor.write_evaluation(done, results)
