"""One run folder as it is now: what was read of it so far, and how the run stands."""

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from m2_ds.watch.follow import Columns, Records

State = Literal["waiting", "running", "quiet", "ended", "finished", "gone"]
EVENT_FILES = {"anomalies": "anomalies.jsonl", "restarts": "restarts.jsonl"}
RECENT = 20  # log lines that rates are taken over
PATIENCE = 4.0  # times the usual time between two lines
LEAST_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Event:
    """Something that a file of its own tells: what was odd, or why a job was started again."""

    kind: str
    step: int
    reason: str


@dataclass(frozen=True)
class Standing:
    """How a run stands. ``words``: a sentence; seconds since its last sign of life, and to its end."""

    state: State
    words: str
    step: int
    steps: int | None
    age_s: float | None
    remaining_s: float | None


class WatchedRun:
    """Reads what is new at every `refresh`; whatever is missing or damaged becomes a note."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self.seen = False
        self.version = 0
        self.notes: list[str] = []
        self.log = Records(folder / "log.jsonl")
        self.lines = Columns()
        self.config: dict[str, Any] = {}
        self.environment: dict[str, Any] = {}
        self.evaluations: dict[int, dict[str, float]] = {}
        self.events: list[Event] = []
        self.checkpoint: tuple[int, float] | None = None  # step, when it was written
        self._event_files = {kind: Records(folder / name) for kind, name in EVENT_FILES.items()}
        self._files: dict[Path, tuple[tuple[int, int], Any]] = {}  # what was parsed of which state of a file
        self._sign = 0.0  # newest time of a file other than the log

    def refresh(self) -> None:
        """Read on. ``version`` changes with what was found."""
        before = self._mark()
        self.notes = []
        if not self.folder.is_dir():
            if self.seen and len(self.lines):
                self.notes.append("the folder is gone: numbers are those read before")
        else:
            self.seen, self._sign = True, 0.0
            self._read_log()
            self.config = self._parsed(self.folder / "config.yaml", _yaml) or {}
            self.environment = self._parsed(self.folder / "environment.json", json.loads) or {}
            self._read_evaluations()
            self._read_checkpoints()
            self._read_events()
        if self._mark() != before:
            self.version += 1

    def _mark(self) -> Any:
        """What tells whether there is anything new to show."""
        return (
            len(self.lines),
            self.lines.last("step"),
            self.lines.last("time"),
            self.checkpoint,
            len(self.events),
            self.notes,
            self.folder.is_dir(),
            {path: stamp for path, (stamp, _) in self._files.items()},
        )

    # -- files -------------------------------------------------------------------------------------------------------

    def _read_log(self) -> None:
        try:
            anew, found = self.log.read()
        except OSError as error:
            self.notes.append(f"log.jsonl cannot be read: {error.strerror}")
            return
        if anew:
            self.lines = Columns()
        for entry in found:
            self.lines.append(entry)
        if self.log.damaged:
            self.notes.append(f"log.jsonl: {self.log.damaged} damaged line(s) left out, last {self.log.example}")

    def _read_events(self) -> None:
        for kind, records in self._event_files.items():
            try:
                anew, found = records.read()
            except OSError as error:
                self.notes.append(f"{records.tail.path.name} cannot be read: {error.strerror}")
                continue
            if anew:
                self.events = [event for event in self.events if event.kind != kind]
            self.events += [Event(kind, entry["step"], str(entry.get("reason", ""))) for entry in found]
            if records.damaged:
                self.notes.append(
                    f"{records.tail.path.name}: {records.damaged} damaged line(s) left out, last {records.example}"
                )

    def _parsed(self, path: Path, parse: Any) -> Any:
        """A file's content, parsed again only when it has changed. None, and a note, where it is damaged."""
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if path not in self._files or self._files[path][0] != stamp:
                try:
                    found: Any = parse(path.read_text(encoding="utf-8"))
                    if not isinstance(found, dict):
                        found = ValueError("no mapping")
                except (ValueError, yaml.YAMLError, RecursionError) as error:
                    found = error
                self._files[path] = (stamp, found)
        except FileNotFoundError:
            self._files.pop(path, None)
            return None
        except OSError as error:
            self.notes.append(f"{path.relative_to(self.folder)} cannot be read: {error.strerror}")
            return None
        self._sign = max(self._sign, status.st_mtime)
        found = self._files[path][1]
        if isinstance(found, Exception):
            self.notes.append(f"{path.relative_to(self.folder)} is damaged: {str(found).splitlines()[0]}")
            return None
        return found

    def _read_evaluations(self) -> None:
        self.evaluations = {}
        for path in sorted(self.folder.glob("evaluation/step-*.json")):
            found = self._parsed(path, json.loads)
            if found is None:
                continue
            step, metrics = found.get("step"), found.get("metrics")
            if not isinstance(step, int) or not isinstance(metrics, dict):
                self.notes.append(f"{path.relative_to(self.folder)} is no evaluation")
                continue
            self.evaluations[step] = {
                name: float(x) for name, x in metrics.items() if isinstance(x, int | float) and np.isfinite(x)
            }
        self.evaluations = dict(sorted(self.evaluations.items()))

    def _read_checkpoints(self) -> None:
        self.checkpoint = None
        for path in self.folder.glob("checkpoints/*step-*"):  # those being written, too, are a sign of life
            try:
                written = path.stat().st_mtime
            except OSError:
                continue
            self._sign = max(self._sign, written)
            digits = path.name.removeprefix("step-")
            if digits.isdecimal() and (self.checkpoint is None or int(digits) > self.checkpoint[0]):
                self.checkpoint = (int(digits), written)

    # -- how it stands -----------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int | None:
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0 else None

    @property
    def step(self) -> int:
        return int(self.lines.last("step") or 0)

    def seconds_a_step(self) -> float | None:
        """Of this job's newest lines, by the clock where lines tell the time: evaluation and checkpoints are in it."""
        if not len(self.lines):
            return None
        step, at, own = (self.lines.get(name)[-RECENT:] for name in ("step", "time", "step_s"))
        rows = np.flatnonzero(at > self._started())  # NaN is not
        if len(rows) > 1:
            return float((at[rows[-1]] - at[rows[0]]) / (step[rows[-1]] - step[rows[0]]))
        own = own[np.isfinite(own)]
        return float(own.mean()) if len(own) else None

    def _started(self) -> float:
        """When the newest job did, seconds since 1970: it writes environment.json first."""
        found = self._files.get(self.folder / "environment.json")
        return found[0][0] / 1e9 if found else 0.0

    def usual_gap_s(self) -> float | None:
        """Between two log lines."""
        each = self.seconds_a_step()
        step = self.lines.get("step")[-RECENT:]
        if each is None:
            return None
        gaps = np.diff(step) if len(step) > 1 else step
        return float(np.median(gaps)) * each

    def standing(self, now: float | None = None) -> Standing:
        now = time.time() if now is None else now
        sign = max(self._sign, self.log.tail.written)
        age = max(0.0, now - sign) if sign else None
        each, steps = self.seconds_a_step(), self.steps
        left = each * max(0, steps - self.step) if each is not None and steps is not None else None

        def standing(state: State, words: str, remaining: float | None = left) -> Standing:
            return Standing(state, words, self.step, steps, age, remaining)

        if not self.folder.is_dir():
            if self.seen:
                return standing("gone", "its folder was removed", None)
            return standing("waiting", "there is no such folder yet", None)
        if steps is not None and self.step >= steps:
            return standing("finished", f"all {steps:,} steps are done", 0.0)
        held, gap = self._held(), self.usual_gap_s() or 0.0
        if held is False and age is not None and age > max(LEAST_PATIENCE_S / 3, PATIENCE / 2 * gap):
            done = f"after step {self.step:,}" if len(self.lines) else "before its first line"
            return standing("ended", f"no job holds this folder: it ended {done}", None)
        if not len(self.lines):
            told = f", for {duration(age)}" if age is not None else ""
            return standing("waiting", f"no line yet{told}", None)
        silent = max(0.0, now - self.log.tail.written)
        if age is not None and age > max(LEAST_PATIENCE_S, PATIENCE * gap):
            usual = f", and one comes every {duration(gap)}" if gap else ""
            there = "; a job still holds the folder" if held else ""
            return standing("quiet", f"no line for {duration(silent)}{usual}{there}")
        return standing("running", f"last line {duration(silent)} ago")

    def _held(self) -> bool | None:
        """Whether a job holds the folder's lock, by what this machine's kernel lists; None where it cannot tell."""
        if self.environment.get("host") != platform.node():
            return None
        try:
            inode = (self.folder / ".lock").stat().st_ino
            locks = Path("/proc/locks").read_text()
        except OSError:
            return None
        return f":{inode} " in locks


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def duration(seconds: float | None) -> str:
    """'8 s', '12 min', '3 h 20 min', '2 d 5 h'."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 2 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
