"""Seconds of a step by phase, without making the host wait for the device."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch

from m2_ds.parallel.activity import Activity

MARK = "phase: "


class Clock:
    """``with clock("forward"): ...`` adds up the time of a phase: the host's on a CPU, the stream's on a GPU.

    ``activity`` is told the phase, too. ``marked``: a profiler is running, and finds the phases in its trace. ``now``:
    the host's seconds.
    """

    def __init__(self, device: torch.device, activity: Activity) -> None:
        self._activity = activity
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.marked = False
        self.now: Callable[[], float] = time.perf_counter

    def __call__(self, phase: str) -> contextlib.AbstractContextManager[None]:
        return self._marked(phase) if self.marked else self._timed(phase)

    @contextlib.contextmanager
    def _marked(self, phase: str) -> Iterator[None]:
        with torch.profiler.record_function(MARK + phase), self._timed(phase):
            yield

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self._activity.now(phase)
        if self._on_gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((phase, first, last))
        else:
            started = self.now()
            yield
            self._seconds[phase] += self.now() - started

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call. On a GPU the recorded work must be done."""
        for phase, first, last in self._events:
            self._seconds[phase] += first.elapsed_time(last) / 1000
        found = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return found
