"""A job that is started again when that helps: after a lost rank or a killed one, not after a wrong input.

What a launcher's exit code says of its ranks is put right first: it is that of the rank which it happened to find
ended, and of a killed one 256 less the signal.
"""

import contextlib
import datetime
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from m2_ds.convert.run_folder import CHECKPOINTS, checkpoint_steps

LOG = "restarts.jsonl"
ENDED_FILE = "M2_DS_ENDED"  # in the environment of ranks: the file in which they say how the job ended

_DONE, _BROKEN, _INTERRUPTED, _LOST = 0, 1, 75, 76
_TELLING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # somebody wants the job to end
_IN_VAIN = 3  # restarts in a row without a step or checkpoint that is new
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_GRACE_S = 60.0  # which ranks have that outlived their launcher; they are told to end by its going

# Starts the job with more environment; its launcher's exit code (as of subprocess), and whether it was told to end.
Start = Callable[[dict[str, str]], tuple[int, bool]]


@dataclass(frozen=True)
class End:
    """How a start ended. ``code``: see docs/survival.md; ``step``: the last that was done, where it is known."""

    code: int
    reason: str
    step: int | None = None
    told: bool = False

    @property
    def again(self) -> bool:
        return self.code == _LOST and not self.told


def supervise(start: Start, folder: Path, steps: int, restarts: int) -> int:
    """Start the job, and up to ``restarts`` times again; the exit code of its last end.

    ``folder``, ``steps``: of the run. Every restart is a line of the run folder's restarts.jsonl.
    """
    end = _once(start, folder, steps)
    best, in_vain, number = (-1, -1), 0, 0
    while end.again and number < restarts:
        progress = (_newest(folder), -1 if end.step is None else end.step)
        in_vain = in_vain + 1 if all(new <= old for new, old in zip(progress, best)) else 0
        best = (max(best[0], progress[0]), max(best[1], progress[1]))
        goes_on = in_vain < _IN_VAIN
        wait = min(_FIRST_WAIT_S * 2**in_vain, _LONGEST_WAIT_S)
        _note(folder, end, number + 1, progress[0], goes_on)
        if not goes_on:
            _say(f"{_IN_VAIN} restarts in a row made no new step and no new checkpoint: it is not started again")
            return _BROKEN
        number += 1
        behind = f"step {progress[0]}" if progress[0] >= 0 else "the beginning"
        _say(f"ended with {end.code}; restart {number} of {restarts} goes on from {behind}, in {wait:.0f} s")
        if _told_while_waiting(wait):
            _say("told to end before the restart; the same command goes on")
            return _INTERRUPTED
        end = _once(start, folder, steps)
    if end.again and restarts:
        _say(f"ended with {end.code} after {restarts} restart(s): the same command goes on")
    return end.code


def _once(start: Start, folder: Path, steps: int) -> End:
    with tempfile.TemporaryDirectory(prefix="m2-train-") as place:
        path = Path(place) / "ended.json"
        code, told = start({ENDED_FILE: str(path)})
        _end_leftovers(str(path))
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            note = None
        return how_it_ended(code, note, told, steps in checkpoint_steps(folder / CHECKPOINTS))


def how_it_ended(code: int, note: Mapping[str, Any] | None, told: bool, finished: bool) -> End:
    """What is true, from the launcher's ``code``, the ranks' own ``note`` if they could leave one, whether this process
    was ``told`` to end, and whether the run's last checkpoint is there."""
    if note is not None:
        return End(note["code"], note["reason"], note["step"], told)
    number = -code if code < 0 else 256 - code
    if number in set(signal.Signals):
        name = signal.Signals(number).name
        if number in _TELLING:
            return End(128 + number, f"ended by {name} before it could write a checkpoint", told=True)
        return End(_LOST, f"a rank or its launcher was killed by {name}", told=told)
    if code == _DONE and not finished:  # deepspeed's word when its own launcher of this machine was killed
        return End(_LOST, "the launcher ended before its ranks did", told=told)
    return End(code, "done" if code == _DONE else "what was printed above says why", told=told)


def _newest(folder: Path) -> int:
    return max(checkpoint_steps(folder / CHECKPOINTS), default=-1)


def _note(folder: Path, end: End, number: int, newest: int, goes_on: bool) -> None:
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "restart": number if goes_on else None,
        "code": end.code,
        "reason": end.reason,
        "reached_step": end.step,
        "from_step": max(newest, 0),
    }
    with contextlib.suppress(OSError):  # a disk that is full is no reason not to go on
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _told_while_waiting(seconds: float) -> bool:
    told = False

    def noted(number: int, frame: Any) -> None:
        nonlocal told
        told = True

    before = {number: signal.signal(number, noted) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        deadline = time.monotonic() + seconds
        while not told and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return told


def _end_leftovers(mark: str) -> None:
    """Wait for processes of the job that outlived its launcher, which hold its files and memory; kill what stays."""
    left = list(_marked(mark))
    if left:
        _, left = psutil.wait_procs(left, timeout=_GRACE_S)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _marked(mark: str) -> Iterator[psutil.Process]:
    """Processes with this start's mark, which nothing else has, in their environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(ENDED_FILE) == mark:
                yield process


def _say(text: str) -> None:
    print(f"m2 train: {text}", flush=True)
