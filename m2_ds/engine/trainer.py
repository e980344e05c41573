"""The training loop: batches in, updates out, and what happens between them."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m2_ds.config import RunConfig
from m2_ds.data.stream import next_batch
from m2_ds.data.text import Tokenizer
from m2_ds.engine import resume
from m2_ds.engine.anomalies import Records, RollBack, Watch, leave_out, left_out, not_finite, saved_state
from m2_ds.engine.batches import StepBatches
from m2_ds.engine.interrupt import Interrupted, Interruption
from m2_ds.engine.monitor import Monitor
from m2_ds.engine.passes import EnginePasses
from m2_ds.engine.profiling import Profiler
from m2_ds.engine.rollback import go_back
from m2_ds.engine.saving import Saving
from m2_ds.engine.step import ContrastiveStep
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
        words = tokenizer.words() if config.loss.masked else None
        self.activity = mesh.traffic.activity
        self.step = ContrastiveStep(engine, config, mesh, len(self.languages), words)

    def run(self, start: int, samples: int, found: Path | None = None) -> None:
        """``start``, ``samples``: steps that were done, and pairs that the run has seen, before this job.

        ``found``: the checkpoint that the engine stands at.
        """
        watch = Watch(self.engine, self.config.anomalies, self.mesh, fresh=found is None)
        if self.config.anomalies.watched and isinstance(self.step.passes, EnginePasses):
            self.step.passes.tell_norm = watch.told  # which waits for the device
        with Interruption(self.mesh, start) as interruption:
            returns: Counter[int] = Counter()
            while True:
                watch.restore(saved_state(found))
                try:
                    return self._from(start, samples, watch, left_out(self.config, found, self.mesh), interruption)
                except RollBack as back:
                    found = go_back(self.engine, self.model, self.config, self.mesh)
                    start, samples = resume.step(found), resume.samples(found)
                    returns[start] += 1
                    if returns[start] > self.config.anomalies.most_in_a_row:
                        raise back.given_up(returns[start]) from None
                    log.warning("gone back to the checkpoint behind step %d, without the batch of %s", start, back)

    def _from(self, start: int, samples: int, watch: Watch, passed_over: list[int], interruption: Interruption) -> None:
        """Carry the run to its end. Raises `RollBack`, on every rank, where it has to go back first."""
        config, mesh = self.config, self.mesh
        self.activity.step = start
        if start:
            log.info("going on after step %d of %d", start, config.steps)
        with (
            contextlib.closing(StepBatches(config, mesh, self.tokenizer, samples, passed_over)) as batches,
            Profiler(config, mesh, self.step.clock) as profiler,
        ):
            stream, records = batches.stream, Records(config, mesh)
            saving = Saving(self.engine, self.model, config, self.tokenizer, mesh, has_one=start > 0)
            with (
                saving,
                Monitor(config, mesh, self.step, self.languages, start, samples, stream, records, watch) as monitor,
            ):
                if start and config.evaluation_due(start) and not self._evaluated(start):
                    self._evaluate(start, monitor)  # the job ended between this checkpoint and its evaluation
                self.engine.train()
                profiler.between(start)
                for step in range(start, config.steps):
                    asked = time.perf_counter()
                    self.activity.now("waiting for data")
                    pairs = next(batches)
                    waited = time.perf_counter() - asked
                    self.activity.now("step")
                    watch.begin()
                    result = self.step(pairs, step)
                    first = next_batch(samples, config.global_batch, passed_over)
                    samples = first + config.global_batch
                    records.note(step + 1, first, pairs, result.by_pair, result.grad_norm)
                    kind = watch.end(result.grad_norm)
                    if kind is not None:
                        self._anomaly(step + 1, first, kind, watch, records)
                    self.activity.done(step + 1)
                    stop = interruption.due(step + 1) and step + 1 < config.steps
                    monitor.add(step, pairs, result, waited, samples, stop, kind is not None)
                    paused = time.perf_counter()
                    with mesh.traffic.left_out():
                        state = None if stream is None else stream.state(samples)
                        self._between(step + 1, monitor, saving, state, watch.state(passed_over), stop)
                        profiler.between(step + 1)
                    monitor.pause(time.perf_counter() - paused)
                monitor.finish()

    def _anomaly(self, done: int, first: int, kind: str, watch: Watch, records: Records) -> None:
        """What `config.anomalies` asks for behind a step whose update was held back.

        ``first``: where its global batch begins.
        """
        records.write(done, kind, watch.norms)
        policy, most = self.config.anomalies.policy, self.config.anomalies.most_in_a_row
        if policy == "stop":
            raise not_finite(done, kind, "")
        if policy == "roll_back":
            leave_out(self.config, first, self.mesh)
            raise RollBack(done, kind)
        if watch.in_a_row > most:
            raise not_finite(done, kind, f", the {watch.in_a_row}th in a row (anomalies.most_in_a_row is {most})")

    def _between(
        self,
        done: int,
        monitor: Monitor,
        saving: Saving,
        stream: dict[str, Any] | None,
        anomalies: dict[str, Any] | None,
        stop: bool,
    ) -> None:
        """Checkpoint and evaluation, where step number ``done`` (from 1) calls for them.

        ``stream``, ``anomalies``: where they stand, for the checkpoint. ``stop``: the job was told to end; Interrupted
        is raised behind the checkpoint, and an evaluation that is due is made when the run goes on.
        """
        if stop or self.config.checkpoint_due(done):
            with self.activity.during("checkpoint", patient=True):
                saving.save(done, stream, anomalies, last=stop or done == self.config.steps)
        elif done % self.config.log.every == 0:
            saving.look()
        if stop:
            raise Interrupted(done)
        if self.config.evaluation_due(done):
            saving.wait()
            self._evaluate(done, monitor)

    def _evaluate(self, done: int, monitor: Monitor) -> None:
        self.engine.eval()
        with self.activity.during("evaluation", patient=True):
            results = self.evaluate()
        self.engine.train()
        monitor.write_evaluation(done, results, self._evaluation_file(done))

    def _evaluated(self, done: int) -> bool:
        return broadcast_object(self._evaluation_file(done).exists(), self.mesh.world)

    def _evaluation_file(self, done: int) -> Any:
        return self.config.folder / "evaluation" / f"step-{done:08}.json"
