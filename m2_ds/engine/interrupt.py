"""A job that is told to end (SIGTERM, SIGUSR1): all ranks stop behind the same step, with a checkpoint.

A signal may reach one rank only. It leaves a note on the launcher's store with the number of the step behind which all
stop, and every rank looks there after each of its steps (one small message, no collective). No rank can be more than a
step ahead of another, for a step ends with a sum over all of them: so a note that names the next step is seen by all in
time.
"""

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from m2_ds.parallel.board import Board
from m2_ds.parallel.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
_STOP = "stop behind step"
_SECONDS = 60.0

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """Raised on every rank behind a step whose checkpoint is written."""

    def __init__(self, done: int) -> None:
        super().__init__(
            f"told to end, and did so behind step {done}, whose checkpoint is written; the same command goes on from it"
        )


class ToldAtStart(Exception):
    """Raised on a rank that is told to end before its first step, when no checkpoint is due."""


@contextlib.contextmanager
def told_at_start() -> Iterator[None]:
    """Inside, up to an `Interruption`, signals raise `ToldAtStart`."""

    def told(number: int, _: FrameType | None) -> NoReturn:
        name = signal.Signals(number).name
        raise ToldAtStart(f"told to end by {name} before its first step; the same command goes on")

    before = {number: signal.signal(number, told) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is told:  # an `Interruption` that has ended its job may leave another
                signal.signal(number, handler)


class Interruption:
    """A context: inside, signals are noted instead of ending the process. Every rank has one."""

    def __init__(self, mesh: Mesh, start: int) -> None:
        """``start``: the step that the job begins with, so that notes of a job before it are not read as its own."""
        self._board = Board.join(_SECONDS) if mesh.world_size > 1 else None
        self._note = f"{_STOP} from {start}"
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._noted)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        # A rank that has stopped as it was told still writes its last lines: a launcher's second signal is not needed.
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if kind is Interrupted else handler)

    def _noted(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number)

    def due(self, done: int) -> bool:
        """Whether all ranks stop behind step number ``done`` (from 1). Each of them asks after every step."""
        if self._board is None:
            return self._signal is not None
        if self._signal is not None:
            stop = self._board.agree(self._note, done + 1)
            log.info("%s: stopping behind step %d", self._signal.name, stop)
        else:
            stop = self._board.agreed(self._note)
        return stop is not None and done >= int(stop)
