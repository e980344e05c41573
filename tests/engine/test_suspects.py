"""Who is to blame, from notes that ranks left: cases worked out by hand, with seconds that are made up."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from m2_ds.engine import suspects
from m2_ds.engine.suspects import LOST, Place, Suspects, WakingClock
from m2_ds.parallel.activity import Activity

HANG, PATIENCE, SILENCE = 10.0, 100.0, 4.0


def places(count: int) -> list[Place]:
    """Each on a machine of its own, so that no process is looked for."""
    return [Place(rank, f"node{rank}", 100 + rank, f"machine {rank}", "1") for rank in range(count)]


def note(beat: int, **changes: Any) -> dict[str, Any]:
    said = {"step": 5, "doing": "forward", "starting": False, "patient": False, "collective": "", "inside": False}
    return {**said, "marks": 3, "beat": beat, "left": False, "broken": "", **changes}


def hear_for(seconds: int, of: Suspects, **by_rank: dict[str, Any]) -> Any:
    """A note of every rank each second with fixed content (``r0=...``); the verdict at the end."""
    for second in range(seconds + 1):
        of.hear({int(rank[1:]): note(second, **said) for rank, said in by_rank.items()}, float(second))
    return of.verdict(float(seconds))


@pytest.fixture
def two() -> Suspects:
    return Suspects(places(2), 0, HANG, PATIENCE, SILENCE)


WAITS = {"inside": True, "collective": "all-gather of ids in all ranks", "marks": 9}


def test_the_rank_that_others_wait_for_is_named(two: Suspects) -> None:
    assert hear_for(10, two, r0=WAITS, r1={"doing": "waiting for data"}) is None
    found = hear_for(11, two, r0=WAITS, r1={"doing": "waiting for data"})
    assert (found.kind, found.code, found.ranks) == ("stuck", LOST, (1,))
    assert "rank 1 (host node1, process 101; step 6: waiting for data) has made no progress for 11 s" in found.reason
    assert "others wait: rank 0 (host node0, process 100; step 6: forward; in all-gather of ids" in found.reason


@pytest.mark.parametrize(
    ("first", "second", "blamed"),
    [
        ({"step": 5}, {"step": 6}, (0,)),  # a step behind
        ({"marks": 9}, {"marks": 3}, (1,)),  # DeepSpeed waits where nothing is noted; the other did not come so far
        ({**WAITS, "marks": 2}, {"marks": 3}, (1,)),  # of a pipeline: stages do different things
        ({**WAITS, "marks": 9}, {**WAITS, "marks": 9}, (0, 1)),  # the network
    ],
)  # fmt: skip
def test_who_is_behind(two: Suspects, first: Any, second: Any, blamed: tuple[int, ...]) -> None:
    assert hear_for(11, two, r0=first, r1=second).ranks == blamed


def test_progress_and_phases_that_take_their_time_are_no_hang(two: Suspects) -> None:
    for second in range(50):
        two.hear({0: note(second, marks=second), 1: note(second, patient=True, doing="checkpoint")}, float(second))
        assert two.verdict(float(second)) is None
    assert hear_for(99, Suspects(places(1), 0, HANG, PATIENCE, SILENCE), r0={"patient": True}) is None
    assert hear_for(101, Suspects(places(1), 0, HANG, PATIENCE, SILENCE), r0={"patient": True}) is not None
    assert hear_for(999, Suspects(places(1), 0, 0.0, PATIENCE, SILENCE), r0={}) is None  # switched off


def test_silence_is_told_sooner_where_a_connection_broke() -> None:
    two = Suspects(places(2), 0, 100.0, PATIENCE, 60.0)
    two.hear({0: note(1), 1: note(1)}, 0.0)
    two.hear({0: note(2, marks=4), 1: note(1)}, 11.0)
    assert two.verdict(11.0) is None
    two.hear({0: note(3, marks=5, broken="Connection reset by peer"), 1: note(1)}, 12.0)
    found = two.verdict(12.0)
    assert found is not None and found.kind == "silent" and found.ranks == (1,)
    assert "has given no sign of life for 12 s: its host or network is lost" in found.reason


@pytest.mark.parametrize(("starting", "longest"), [(True, 20.0), (False, 4.0)])
def test_silence_is_borne_longer_until_the_first_step_is_done(two: Suspects, starting: bool, longest: float) -> None:
    quiet = note(1, starting=starting, patient=True, doing="start")
    two.hear({0: note(1), 1: quiet}, 0.0)
    two.hear({0: note(2, marks=4), 1: quiet}, longest)
    assert two.verdict(longest) is None
    two.hear({0: note(3, marks=5)}, longest + 0.5)
    assert two.verdict(longest + 0.5).ranks == (1,)  # type: ignore[union-attr]


def test_a_silent_rank_is_waited_for_though_its_silence_is_borne(two: Suspects) -> None:
    quiet = note(1, starting=True, patient=True, step=4)
    for second in range(12):
        two.hear({0: note(second, **WAITS), 1: quiet}, float(second))
    found = two.verdict(11.0)
    assert found is not None and (found.kind, found.ranks) == ("stuck", (1,)) and "others wait: rank 0" in found.reason


def test_ranks_that_left_in_order_are_not_missed(two: Suspects) -> None:
    two.hear({0: note(1), 1: note(1, left=True)}, 0.0)
    two.hear({0: note(2, marks=4), 1: note(1, left=True)}, 50.0)
    assert two.verdict(50.0) is None


def test_only_the_first_rank_says_who_waits_for_whom() -> None:
    second = Suspects(places(2), 1, HANG, PATIENCE, SILENCE)
    assert hear_for(50, second, r0=WAITS) is None
    assert second.verdict(55.0).ranks == (0,)  # type: ignore[union-attr]  # silent since 50


@pytest.fixture
def neighbour() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


def test_a_process_of_this_machine_is_missed_at_once(neighbour: subprocess.Popen[bytes]) -> None:
    mine = Place.here(0)
    other = replace(mine, rank=1, pid=neighbour.pid, started=suspects._process(neighbour.pid)[1])
    found = Suspects([mine, other], 0, HANG, PATIENCE, SILENCE)
    found.hear({0: note(1), 1: note(1)}, 0.0)
    assert found.verdict(1.0) is None and other.state() in ("S", "R")
    neighbour.send_signal(signal.SIGSTOP)
    for _ in range(100):
        if other.state() == "T":
            break
        time.sleep(0.01)
    assert found.verdict(1.0) is None
    found.hear({0: note(9), 1: note(1)}, 9.0)
    assert "its process is stopped (state T)" in found.verdict(9.0).reason  # type: ignore[union-attr]
    neighbour.kill()
    for _ in range(100):
        if not other.state():
            break
        time.sleep(0.01)
    gone = found.verdict(9.0)  # still there as a zombie, for nobody waited for it
    assert gone is not None and gone.kind == "gone" and "rank 1" in gone.reason and "is gone" in gone.reason
    assert replace(mine, rank=1, started="12").state() == ""  # the number of a process that came later
    assert suspects.Verdict.read({**vars(gone), "ranks": list(gone.ranks)}) == gone
    assert os.getpid() == mine.pid


def test_a_clock_does_not_count_the_time_in_which_the_process_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0.0, 1.0, 3.0, 1003.0, 1004.0])
    monkeypatch.setattr(suspects.time, "monotonic", lambda: next(readings))
    clock = WakingClock(3.0)
    assert [clock() for _ in range(4)] == [1.0, 3.0, 6.0, 7.0]


def test_what_a_rank_says_of_itself() -> None:
    activity = Activity()
    assert activity.note()["patient"]
    activity.now("forward")
    assert activity.note()["patient"]  # until its first step is done
    activity.done(5)
    with activity.waiting_in("all-reduce of gradients in all ranks"):
        assert activity.note() == {
            "step": 5, "doing": "between two steps", "starting": False, "patient": False, "inside": True, "marks": 2,
            "collective": "all-reduce of gradients in all ranks",
        }  # fmt: skip
    with activity.during("checkpoint", patient=True):
        assert activity.note()["patient"] and not activity.note()["inside"]
    assert activity.doing == "between two steps" and not activity.note()["patient"]
