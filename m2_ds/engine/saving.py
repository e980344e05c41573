"""When checkpoints are written: at once, or by a thread beside training; and what happens when one cannot be.

Beside training (checkpoint.asynchronous) the ranks copy their shares of all numbers at the step's end (`Snapshot`) and
go on. On each of them a thread carries out what is otherwise done at once, over groups of its own: a checkpoint is
published when all ranks have written, synced and hashed their files, and old ones are removed behind that. One is
written at a time. All ranks learn how it ended at the same place: at a log line behind it, at the next checkpoint,
before an evaluation, and at the end of the job.
"""

import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from m2_ds.config import RunConfig
from m2_ds.convert.run_folder import CHECKPOINTS, checkpoint_name
from m2_ds.data.text import Tokenizer
from m2_ds.engine.anomalies import RollBack
from m2_ds.engine.checkpoint import Content, Unwritten, agree_finite, refuse_non_finite, write
from m2_ds.engine.optimizer_state import OptimizerState
from m2_ds.engine.snapshot import Snapshot
from m2_ds.model.encoder import M2Encoder
from m2_ds.parallel.collectives import all_gather_objects
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)


class _Writing(threading.Thread):
    """One checkpoint under way on this rank."""

    def __init__(self, content: Content, snapshot: Snapshot, mesh: Mesh) -> None:
        super().__init__(name=f"m2-{checkpoint_name(content.step)}", daemon=True)
        self.content, self.snapshot, self.mesh = content, snapshot, mesh
        self.seconds = 0.0
        self.unwritten: str | None = None
        self.broken: BaseException | None = None

    def run(self) -> None:
        started = time.perf_counter()
        try:
            agree_finite(self.snapshot.finite(), self.content.step, self.mesh)
            write(self.content, self.mesh)
        except Unwritten as error:
            self.unwritten = str(error)
        except BaseException as error:
            self.broken = error
        self.seconds = time.perf_counter() - started


class Saving:
    """Writes the checkpoints of a job. A context: what is under way at the end is waited for. Every rank has one."""

    def __init__(
        self, engine: Any, model: M2Encoder, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh, has_one: bool
    ) -> None:
        """``has_one``: the run folder holds a good checkpoint already."""
        self.engine, self.model, self.config, self.tokenizer, self.mesh = engine, model, config, tokenizer, mesh
        self.has_one, self.failures = has_one, 0
        self._beside = mesh.beside() if config.checkpoint.asynchronous else None
        self._snapshot: Snapshot | None = None
        self._writing: _Writing | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Numbers that are not finite stop all ranks alike: what was whole before them is still written. Of other errors
        # a rank may be alone with, and then it has to tell its reason at once.
        if kind is None or issubclass(kind, FloatingPointError | RollBack):
            try:
                self.wait()
            except (ValueError, RuntimeError, FloatingPointError) as late:
                if kind is None:
                    raise
                log.warning("%s", late)

    def save(self, step: int, stream: dict[str, Any] | None, anomalies: dict[str, Any] | None, last: bool) -> None:
        """Write one behind ``step``, or begin to, with what state.json tells of the data and of anomalies.

        ``last``: no other is due, so it is waited for.

        Raises ValueError where files could not be written and the run must not go on without them.
        """
        started = time.perf_counter()
        if self._writing is not None:
            under_way = self._writing.is_alive()
            self.wait()
            if under_way:
                log.info(
                    "waited %.1f s for the checkpoint before; raise checkpoint.every, or write to a faster disk",
                    time.perf_counter() - started,
                )
        name = checkpoint_name(step)
        if self._beside is None:
            refuse_non_finite(self.model, step, self.mesh)
            try:
                path = write(self._content(step, stream, anomalies, None), self.mesh)
            except Unwritten as error:
                self._failed(name, str(error), last)
            else:
                self._written(path, time.perf_counter() - started)
            return
        if self._snapshot is None:
            state = OptimizerState(self.engine, self.mesh.data_parallel)
            self._snapshot = Snapshot(state, self.model, self._beside.data_parallel)
            log.info("checkpoints beside training: %.2f GB of memory on this rank", self._snapshot.bytes() / 1e9)
        self._snapshot.take()
        self._writing = _Writing(self._content(step, stream, anomalies, self._snapshot), self._snapshot, self._beside)
        self._writing.start()
        log.info(
            "checkpoint %s is written beside training, which it held up %.2f s", name, time.perf_counter() - started
        )
        if last:
            self._settle(last)

    def _content(
        self, step: int, stream: dict[str, Any] | None, anomalies: dict[str, Any] | None, state: Snapshot | None
    ) -> Content:
        found = Content.now(self.engine, self.model, step, self.config, self.tokenizer, self.mesh, stream, state)
        if found.about is not None and anomalies is not None:
            found.about["anomalies"] = anomalies
        return found

    def look(self) -> None:
        """Learn how the one under way has ended, if it has on all ranks. Every rank calls it at the same steps."""
        if self._writing is not None and not any(all_gather_objects(self._writing.is_alive(), self.mesh.world)):
            self._settle(last=False)

    def wait(self) -> None:
        """Until none is under way. Raises as `save`."""
        if self._writing is not None:
            self._settle(last=False)

    def _settle(self, last: bool) -> None:
        writing, self._writing = self._writing, None
        assert writing is not None
        writing.join()
        if writing.broken is not None:
            raise writing.broken
        if writing.unwritten is not None:
            self._failed(checkpoint_name(writing.content.step), writing.unwritten, last)
        else:
            name = checkpoint_name(writing.content.step)
            self._written(self.config.folder / CHECKPOINTS / name, writing.seconds)

    def _written(self, path: Path, seconds: float) -> None:
        self.has_one, self.failures = True, 0
        log.info("checkpoint %s, written in %.1f s", path, seconds)

    def _failed(self, name: str, reason: str, last: bool) -> None:
        """The same on all ranks, who all know the reason."""
        self.failures += 1
        allowed = self.config.checkpoint.failures_allowed
        if self.has_one and not last and self.failures <= allowed:
            log.warning(
                "checkpoint %s could not be written: %s. Training goes on, and the next due step tries again (failure "
                "%d in a row, %d are allowed); older checkpoints are as they were",
                name, reason, self.failures, allowed,
            )  # fmt: skip
            return
        raise ValueError(
            f"checkpoint {name} could not be written to {self.config.folder / CHECKPOINTS}: {reason}. Older "
            "checkpoints are as they were. Look at free space, quota and permissions there, then start the same "
            "command again: it goes on from the newest checkpoint"
        )
