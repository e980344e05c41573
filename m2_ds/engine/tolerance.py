"""Writes that a run can do without: when one fails, training goes on, and what was lost is counted and told."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

_PAUSE_S = 60.0  # between two warnings, and before curves are tried again

log = logging.getLogger(__name__)


class Forgiving:
    """``with forgiving("log line"):`` keeps an OSError (a full disk, a lost folder), and warns once a minute."""

    def __init__(self) -> None:
        self.lost: Counter[str] = Counter()
        self._told: float | None = None

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost[what] += 1
            now = time.monotonic()
            if self._told is None or now - self._told >= _PAUSE_S:
                self._told = now
                log.warning(
                    "a %s could not be written: %s. Training goes on; lost so far: %s", what, error, self._sum()
                )

    def end(self) -> None:
        """Say what was lost in all."""
        if self.lost:
            log.warning("could not be written, and is lost: %s", self._sum())

    def _sum(self) -> str:
        return ", ".join(f"{number} x {what}" for what, number in self.lost.items())


class Board:
    """TensorBoard's writer. Its thread ends at its first error: a minute later a new one begins a new file."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self._writer: SummaryWriter | None = None
        self._broken = float("-inf")
        with contextlib.suppress(OSError):
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Raises OSError where an earlier point, or the new file, could not be written."""
        if self._writer is None:
            if time.monotonic() - self._broken < _PAUSE_S:
                raise OSError(f"{self.folder} could not be written less than a minute ago")
            self._broken = time.monotonic()
            self._writer = SummaryWriter(str(self.folder))
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except OSError:
            self._writer, self._broken = None, time.monotonic()
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
