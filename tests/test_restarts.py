"""Which ends of a job are followed by another start, with functions in the place of launchers."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from m2_ds import restarts
from m2_ds.restarts import ENDED_FILE, how_it_ended, supervise

STEPS = 40


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(restarts, "_told_while_waiting", lambda seconds: bool(waits.append(seconds)))
    monkeypatch.setattr(restarts, "_GRACE_S", 0.3)
    return waits


class Job:
    """Starts that end as they are told to: (launcher's code, rank's note or None, newest checkpoint), one each."""

    def __init__(self, folder: Path, *ends: tuple[int, dict[str, Any] | None, int], told: bool = False) -> None:
        self.folder, self.ends, self.told, self.starts = folder, list(ends), told, 0

    def __call__(self, environment: dict[str, str]) -> tuple[int, bool]:
        code, note, newest = self.ends[min(self.starts, len(self.ends) - 1)]
        self.starts += 1
        if newest:
            (self.folder / f"checkpoints/step-{newest:08}").mkdir(parents=True, exist_ok=True)
        if note is not None:
            Path(environment[ENDED_FILE]).write_text(json.dumps({"rank": 1, **note}))
        return code, self.told

    def run(self, limit: int) -> int:
        return supervise(self, self.folder, STEPS, limit)

    def lines(self) -> list[dict[str, Any]]:
        path = self.folder / restarts.LOG
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lost(step: int) -> dict[str, Any]:
    return {"code": 76, "reason": "rank 1 is gone", "step": step}


DONE = {"code": 0, "reason": "done", "step": STEPS}


def test_it_is_started_until_it_is_done(tmp_path: Path, no_waiting: list[float]) -> None:
    job = Job(tmp_path, (247, lost(7), 5), (247, None, 5), (0, DONE, STEPS))
    assert job.run(5) == 0 and job.starts == 3
    first, second = job.lines()
    assert first == {**first, "restart": 1, "code": 76, "reason": "rank 1 is gone", "reached_step": 7, "from_step": 5}
    assert second["restart"] == 2 and second["reason"] == "a rank or its launcher was killed by SIGKILL"
    assert second["time"].endswith("+00:00") and no_waiting == [1.0, 2.0]  # the second made nothing new


@pytest.mark.parametrize(
    ("code", "note"),
    [
        (2, None),
        (2, {"code": 2, "reason": "slot 41: no usable pair", "step": 3}),
        (247, {"code": 2, "reason": "not finite", "step": 3}),  # a launcher that found a killed rank before
        (1, None),
        (75, {"code": 75, "reason": "told to end", "step": 3}),
    ],
)
def test_what_another_start_does_not_help(tmp_path: Path, code: int, note: dict[str, Any] | None) -> None:
    job = Job(tmp_path, (code, note, 2))
    assert job.run(5) == (note["code"] if note else code) and job.starts == 1
    assert not job.lines()


def test_never_after_it_was_told_to_end(tmp_path: Path) -> None:
    job = Job(tmp_path, (76, lost(3), 2), told=True)
    assert job.run(5) == 76 and job.starts == 1


def test_it_gives_up_where_nothing_gets_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(tmp_path, (76, lost(4), 2), (76, lost(6), 2), (76, lost(6), 2), (76, lost(5), 2), (76, lost(6), 2))
    assert job.run(99) == 1 and job.starts == 5
    assert "3 restarts in a row made no new step and no new checkpoint" in capsys.readouterr().out
    assert [line["restart"] for line in job.lines()] == [1, 2, 3, 4, None]


def test_no_more_often_than_it_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(tmp_path, *((76, lost(n), n) for n in range(1, 9)))
    assert job.run(2) == 76 and job.starts == 3
    assert "ended with 76 after 2 restart(s): the same command goes on" in capsys.readouterr().out
    alone = Job(tmp_path / "alone", (76, lost(1), 1))
    assert alone.run(0) == 76 and alone.starts == 1


@pytest.mark.parametrize(
    ("code", "finished", "expected", "again"),
    [
        (247, False, 76, True),  # SIGKILL
        (-9, False, 76, True),
        (256 - signal.SIGSEGV, False, 76, True),
        (256 - signal.SIGTERM, False, 143, False),
        (0, True, 0, False),
        (0, False, 76, True),  # deepspeed's, when its launcher of this machine was killed
        (1, False, 1, False),
        (76, False, 76, True),
    ],
)
def test_what_a_launcher_means(code: int, finished: bool, expected: int, again: bool) -> None:
    end = how_it_ended(code, None, False, finished)
    assert (end.code, end.again) == (expected, again)


def test_processes_that_outlive_their_launcher_are_ended(tmp_path: Path) -> None:
    left: list[subprocess.Popen[bytes]] = []

    def start(environment: dict[str, str]) -> tuple[int, bool]:
        left.append(subprocess.Popen(["sleep", "60"], env={**os.environ, **environment}))
        return 1, False

    started = time.monotonic()
    assert supervise(start, tmp_path, STEPS, 0) == 1
    assert left[0].wait(5) == -signal.SIGKILL and time.monotonic() - started < 10


def test_a_signal_while_it_waits_ends_the_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    assert restarts._told_while_waiting(30.0)
    assert time.monotonic() - started < 10
    assert not restarts._told_while_waiting(0.01)
