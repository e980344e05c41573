"""Steps whose numbers are not finite, or far off: their update held back, their batch written down.

    anomalies.jsonl    in the run folder: a line each, with the samples by rank and their losses
    left_out.json      global batches that the run passes over (policy roll_back), by their first slot

The optimizer that DeepSpeed steps is asked first, when the gradient is reduced, its norm known and nothing changed yet,
under every ZeRO stage and in pipelines. An update that is held back is to the engine one that it skips itself for
overflow: moments, weights, schedule and the count of updates stay as they are, and only the number of steps goes on.
The norm is the same number on all ranks, so that they agree without a message.
"""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from m2_ds.config import AnomaliesConfig, RunConfig
from m2_ds.convert.run_folder import STATE
from m2_ds.data.batch import PairBatch
from m2_ds.engine.optimizer_state import OptimizerState
from m2_ds.files import Lines, write_json
from m2_ds.parallel.collectives import all_gather_objects, broadcast_object
from m2_ds.parallel.mesh import Mesh

LEFT_OUT, RECORDS = "left_out.json", "anomalies.jsonl"
NOT_FINITE, SPIKE = "not finite", "spike"
_LEAST_SHARE = 0.05  # of the median, that a deviation is at least

log = logging.getLogger(__name__)


class RollBack(Exception):
    """Raised on every rank behind a step that the run goes back from."""

    def __init__(self, step: int, kind: str) -> None:
        super().__init__(f"step {step} ({kind})")
        self.step, self.kind = step, kind

    def given_up(self, returns: int) -> FloatingPointError:
        why = f", and the run has gone back to one checkpoint {returns} times (anomalies.most_in_a_row)"
        return not_finite(self.step, self.kind, why)


def spiked(norm: float, before: Sequence[float], config: AnomaliesConfig) -> bool:
    """Whether a gradient norm lies too far above the median of those ``before`` (as many as the window holds)."""
    if not config.spike_threshold or len(before) < config.spike_window:
        return False
    median = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in before)
    return norm > median + config.spike_threshold * max(deviation, _LEAST_SHARE * median)


def finite(norm: float) -> bool:
    """DeepSpeed's own mark of a norm that is not finite is inf or -1, by stage."""
    return 0 <= norm < math.inf


class Watch:
    """Stands before the optimizer of a job and decides on every update. Every rank has one, and all decide alike."""

    def __init__(self, engine: Any, config: AnomaliesConfig, mesh: Mesh, fresh: bool) -> None:
        """``fresh``: the optimizer has made no step yet."""
        self.config, self.wrapper = config, engine.optimizer
        self.norms: deque[float] = deque(maxlen=config.spike_window)
        self.skipped = self.in_a_row = 0
        self.norm: float | None = None  # of the step under way, where the engine keeps none
        self._found: str | None = None
        self._asked = False
        if not config.watched:
            return
        if fresh:  # torch makes the state in the first step, which may be held back
            OptimizerState(engine, mesh.data_parallel).begin(0)
        inner = getattr(self.wrapper, "optimizer", self.wrapper)
        update = inner.step

        def step(*arguments: Any, **options: Any) -> Any:
            if not self._asked:
                norm = self.norm if self.norm is not None else self.wrapper._global_grad_norm
                self._judge(float(norm))
            if self._found is None:
                return update(*arguments, **options)
            self.wrapper.overflow = True
            return None

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # which it is, inside: nothing to warn of
        inner.step = step

    def begin(self) -> None:
        """Before a step."""
        self._found, self._asked, self.norm = None, False, None
        if self.config.watched:
            self.wrapper.overflow = False

    def end(self, norm: Tensor | float | None) -> str | None:
        """What the step was found to be, if an anomaly; ``norm``: of its gradient, on the same on every rank."""
        if not self.config.watched or norm is None:
            return None
        if not self._asked:  # the engine has skipped the update itself
            self._judge(float(norm))
        if self._found is None:
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
        return self._found

    def _judge(self, norm: float) -> None:
        self._asked = True
        if not finite(norm):
            self._found = NOT_FINITE
        elif spiked(norm, self.norms, self.config):
            self._found = SPIKE
        else:
            self.norms.append(norm)

    def told(self, norm: float) -> None:
        """The norm of the step under way, where the engine keeps none."""
        self.norm = norm

    def state(self, passed_over: list[int]) -> dict[str, Any] | None:
        """For a checkpoint; `restore` takes it back, and `left_out` the batches ``passed_over``."""
        if not (self.config.watched or passed_over):
            return None
        norms = list(self.norms) if self.config.spike_threshold else []
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "norms": norms, "left_out": passed_over}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        self.norms = deque(state.get("norms", ()), maxlen=self.config.spike_window)


@dataclass(frozen=True)
class _Step:
    """What is kept of a step until its numbers have been looked at. ``by_pair`` [n] of own pairs, on the last stage."""

    number: int
    samples: int
    keys: list[list[str]]
    slots: list[Tensor]
    by_pair: Tensor | None
    norm: Tensor | float | None


class Records:
    """Writes anomalies.jsonl. Every rank has one: a record gathers the pairs of all."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.mesh, self.policy = mesh, config.anomalies.policy
        self.file = Lines(config.folder / RECORDS)
        self._steps: list[_Step] = []

    def note(
        self,
        number: int,
        samples: int,
        batches: Sequence[PairBatch],
        by_pair: Tensor | None,
        norm: Tensor | float | None,
    ) -> None:
        """Keep step ``number`` (from 1), whose global batch begins at slot ``samples``."""
        keys, slots = [batch.keys for batch in batches], [batch.slot for batch in batches]
        self._steps.append(_Step(number, samples, keys, slots, by_pair, norm))

    def forget(self) -> None:
        """Steps that have been looked at."""
        self._steps.clear()

    def write(self, number: int, kind: str, norms: Collection[float] = ()) -> None:
        """The record of a step. Every rank calls it. ``norms``: those that it was compared with."""
        step = next(step for step in self._steps if step.number == number)
        found = all_gather_objects(self._own(step), self.mesh.world)
        if not self.mesh.is_first:
            return
        ranks = [own for own in found if own is not None]
        losses = [x for own in ranks for x in own["loss"]]
        norm = None if step.norm is None else _number(float(step.norm))
        record = {
            "step": number,
            "kind": kind,
            "policy": self.policy,
            "samples": step.samples,
            "loss": _mean(losses),
            "grad_norm": norm,
            "median_norm": statistics.median(norms) if norms else None,
            "ranks": ranks,
        }
        try:
            self.file.append(json.dumps(record, ensure_ascii=False))
        except OSError as error:
            log.warning("%s cannot be written: %s", self.file.path, error)
        bad = [key for own in ranks for key, x in zip(own["keys"], own["loss"]) if x is None]
        log.warning(
            "anomaly (%s) in step %d: gradient norm %s, loss %s%s; its samples are in %s",
            kind, number, norm, record["loss"],
            f", not finite for {len(bad)} pair(s) such as {bad[0]}" if bad else "", self.file.path.name,
        )  # fmt: skip

    def _own(self, step: _Step) -> dict[str, Any] | None:
        """This rank's pairs of the step; None on ranks that have the same pairs as another, or no losses."""
        if not (self.mesh.tensor.is_first and self.mesh.pipeline.is_last):
            return None
        assert step.by_pair is not None
        losses, found = step.by_pair.tolist(), []
        rows = len(losses) // max(len(step.keys), 1)
        keys = [key for keys in step.keys for key in keys]
        for micro, own in enumerate(step.keys):  # rows behind them are padding
            found += losses[micro * rows : micro * rows + len(own)]
        slots = [slot for part, own in zip(step.slots, step.keys) for slot in part.tolist()[: len(own)]]
        return {"rank": self.mesh.rank, "keys": keys, "slots": slots, "loss": [_number(x) for x in found]}


def by_pair(losses: Tensor, weights: Sequence[float]) -> Tensor:
    """[N, C, n] by level, caption and pair to [n]: levels weighted, the mean over captions."""
    return (losses.new_tensor(weights) @ losses.detach().flatten(1)).view(losses.shape[1:]).mean(0)


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None  # JSON has no NaN


def _mean(values: Sequence[float | None]) -> float | None:
    there = [x for x in values if x is not None]
    return sum(there) / len(there) if values and len(there) == len(values) else None


def left_out(config: RunConfig, checkpoint: Path | None, mesh: Mesh) -> list[int]:
    """First slots of the global batches that a run passes over, as the run folder and its checkpoint have them."""
    found: set[int] = set()
    if mesh.is_first:
        if (path := config.folder / LEFT_OUT).exists():
            found |= set(json.loads(path.read_text(encoding="utf-8")))
        found |= set(saved_state(checkpoint).get("left_out", ()))
    return broadcast_object(sorted(found), mesh.world)


def leave_out(config: RunConfig, samples: int, mesh: Mesh) -> None:
    """Note in the run folder that the global batch which begins at slot ``samples`` is passed over from now on."""
    found, error = left_out(config, None, mesh), None
    if mesh.is_first:
        try:
            write_json(config.folder / LEFT_OUT, sorted({*found, samples}))
        except OSError as problem:
            error = str(problem)
    if error := broadcast_object(error, mesh.world):
        raise ValueError(
            f"{config.folder / LEFT_OUT} cannot be written: {error}. A run that goes back has to note there which "
            "batch it passes over. Look at free space and permissions, then start the same command again"
        )


def saved_state(checkpoint: Path | None) -> dict[str, Any]:
    """What a checkpoint keeps of anomalies; nothing in one of a run that did not watch for them."""
    if checkpoint is None:
        return {}
    found = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("anomalies", {})
    return dict(found)


def not_finite(step: int, kind: str, why: str) -> FloatingPointError:
    """How a run ends on an anomaly."""
    found = "is not finite" if kind == NOT_FINITE else "is far larger than those before (anomalies.spike_threshold)"
    return FloatingPointError(
        f"the gradient of step {step} {found}{why}. Lower optim.lr, lengthen optim.schedule.warmup_steps or set "
        f"optim.grad_clip and start the job again: it goes on from the newest checkpoint. {RECORDS} holds the samples; "
        f"m2 replay RUN --step {step} shows them"
    )
