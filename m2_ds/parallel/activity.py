"""What this process is doing at the moment, kept for whoever asks: a few attributes, written without a lock."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


class Activity:
    """Written by the thread that works, read by others. Every change counts as progress.

    ``step``: optimizer steps done; ``doing``: the phase; ``patient``: whether that phase takes its time (checkpoint,
    evaluation), as everything does until the job's first step is done; ``collective``: the last one that was entered,
    ``inside``: and not left yet; ``marks``: how many changes there were since the step before; ``on_first_step`` is
    called when the job has done one.
    """

    def __init__(self) -> None:
        self.step, self.doing, self.patient = 0, "start", True
        self.collective, self.inside = "", False
        self.marks = 0
        self.on_first_step: Callable[[], object] = lambda: None
        self._settled = False

    def now(self, doing: str, patient: bool = False) -> None:
        """From here on it does something else."""
        self.doing, self.patient = doing, patient
        self.marks += 1

    def done(self, step: int) -> None:
        """So many steps are done, the last of them by this job."""
        first, self._settled = not self._settled, True
        self.step, self.marks = step, 0
        self.now("between two steps")
        if first:
            self.on_first_step()

    @contextlib.contextmanager
    def during(self, doing: str, patient: bool = False) -> Iterator[None]:
        """Inside it does something else. An error leaves what it was doing in place, to be told."""
        before = self.doing, self.patient
        self.now(doing, patient)
        yield
        self.now(*before)

    @contextlib.contextmanager
    def waiting_in(self, collective: str) -> Iterator[None]:
        """Inside it waits for other ranks."""
        self.collective, self.inside = collective, True
        self.marks += 1
        try:
            yield
        finally:
            self.inside = False
            self.marks += 1

    def note(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "step": self.step,
            "doing": self.doing,
            "starting": not self._settled,
            "patient": self.patient or not self._settled,
            "collective": self.collective,
            "inside": self.inside,
            "marks": self.marks,
        }
