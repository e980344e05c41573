"""The training loop: batches in, updates out, and what happens between them."""

import contextlib
import logging
import time
from collections.abc import Callable, Generator
from typing import Any, cast

from m2_ds.config import RunConfig
from m2_ds.data.stream import PairBatch, build_loader
from m2_ds.data.text import Tokenizer
from m2_ds.engine import checkpoint
from m2_ds.engine.monitor import Monitor
from m2_ds.engine.step import ContrastiveStep
from m2_ds.files import write_json
from m2_ds.model.encoder import M2Encoder
from m2_ds.parallel.collectives import broadcast_object
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)

Evaluate = Callable[[], dict[str, float]]


class Trainer:
    """Carries a run from one step to its last, with an engine that stands at that step."""

    def __init__(
        self,
        engine: Any,
        model: M2Encoder,
        config: RunConfig,
        mesh: Mesh,
        tokenizer: Tokenizer,
        evaluate: Evaluate,
    ) -> None:
        """``model``: this rank's part of it, inside the engine."""
        self.engine, self.model, self.config, self.mesh = engine, model, config, mesh
        self.tokenizer, self.evaluate = tokenizer, evaluate
        self.languages = list(config.data.languages)
        self.step = ContrastiveStep(engine, config, mesh, len(self.languages))

    def run(self, start: int) -> None:
        config, mesh = self.config, self.mesh
        if start:
            log.info("going on after step %d of %d", start, config.steps)
        micro_batch, accumulation = config.batch_shape(mesh.data_parallel.size)
        loader = build_loader(
            config.data,
            self.tokenizer,
            global_batch=config.global_batch,
            micro_batch=micro_batch,
            accumulation=accumulation,
            seed=config.seed,
            start_step=start,
            rank=mesh.data_parallel.rank,
            world_size=mesh.data_parallel.size,
        )
        with Monitor(config, mesh, self.step, self.languages, start) as monitor:
            if start and config.evaluation_due(start) and not self._evaluated(start):
                self._evaluate(start, monitor)  # the job ended between this checkpoint and its evaluation
            if start >= config.steps:
                return
            self.engine.train()
            # Closed on an error, too: a loader that still works while Python goes down may abort the process.
            with contextlib.closing(cast(Generator[PairBatch, None, None], iter(loader))) as batches:
                for step in range(start, config.steps):
                    asked = time.perf_counter()
                    pairs = [next(batches).to(mesh.device) for _ in range(accumulation)]
                    waited = time.perf_counter() - asked
                    monitor.add(step, pairs, self.step(pairs), waited)
                    paused = time.perf_counter()
                    with mesh.traffic.left_out():
                        self._between(step + 1, monitor)
                    monitor.pause(time.perf_counter() - paused)

    def _between(self, done: int, monitor: Monitor) -> None:
        """Checkpoint and evaluation, where step number ``done`` (from 1) calls for them."""
        if self.config.checkpoint_due(done):
            path = checkpoint.save(self.engine, self.model, done, self.config, self.tokenizer, self.mesh)
            log.info("checkpoint %s", path)
        if self.config.evaluation_due(done):
            self._evaluate(done, monitor)

    def _evaluate(self, done: int, monitor: Monitor) -> None:
        self.engine.eval()
        results = self.evaluate()
        self.engine.train()
        if self.mesh.is_first:
            path = self._evaluation_file(done)
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"step": done, "metrics": results})
        monitor.write_evaluation(done, results)

    def _evaluated(self, done: int) -> bool:
        return broadcast_object(self._evaluation_file(done).exists(), self.mesh.world)

    def _evaluation_file(self, done: int) -> Any:
        return self.config.folder / "evaluation" / f"step-{done:08}.json"
