"""What a run folder says about the run: how it stands, its newest numbers, and what is missing or damaged."""

import fcntl
import io
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from m2_ds.watch import terminal
from m2_ds.watch.command import watch
from m2_ds.watch.numbers import groups
from m2_ds.watch.run import WatchedRun, duration
from tests.watch.folders import Folder, line


def watched(folder: Path) -> WatchedRun:
    run = WatchedRun(folder)
    run.refresh()
    return run


def texts(run: WatchedRun, now: float = 2000.0) -> dict[str, str]:
    return {number.label: number.text for some in groups(run, now).values() for number in some}


def aged(path: Path, at: float) -> None:
    """As if everything in the folder had been written at that time."""
    for file in [path, *path.rglob("*")]:
        os.utime(file, (at, at))


def test_a_run_from_before_its_folder_to_after_its_removal(tmp_path: Path) -> None:
    run = watched(tmp_path / "run")
    assert run.standing().state == "waiting" and "no such folder" in run.standing().words
    folder = Folder(tmp_path / "run")
    run.refresh()
    assert run.standing().state == "waiting" and run.standing().words.startswith("no line yet")
    folder.log(line(10), line(20))
    aged(folder.path, 1010.0)
    run.refresh()
    standing = run.standing(now=1012.0)
    assert (standing.state, standing.step, standing.steps) == ("running", 20, 100)
    assert standing.words == "last line 2 s ago" and standing.remaining_s == pytest.approx(40.0)
    assert run.standing(now=1310.0).words == "no line for 5 min, and one comes every 5 s"
    folder.log(line(100))
    run.refresh()
    assert run.standing().state == "finished" and run.standing().remaining_s == 0
    shutil.rmtree(folder.path)
    run.refresh()
    assert run.standing().state == "gone" and len(run.lines) == 3
    assert "the folder is gone" in run.notes[0]
    Folder(tmp_path / "run").log(line(5))
    run.refresh()
    assert run.lines.get("step").tolist() == [5] and not run.notes


def test_a_version_changes_with_the_content_only(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run").log(line(10))
    run = watched(folder.path)
    before = run.version
    run.refresh()
    assert run.version == before
    changes: list[Any] = [
        lambda: folder.log(line(20)),
        lambda: folder.evaluate(20, en=50.0),
        lambda: folder.log("{broken\n"),
        lambda: folder.write("anomalies.jsonl", '{"step": 20, "reason": "spike"}\n'),
        lambda: (folder.path / "checkpoints/step-00000020").mkdir(parents=True),
        lambda: folder.configure(steps=2000),
    ]
    for change in changes:
        change()
        run.refresh()
        assert run.version == before + 1
        before = run.version
    assert run.steps == 2000


def test_the_rate_is_that_of_this_job_by_the_clock(tmp_path: Path) -> None:
    # A job that stopped for an hour after step 20; since then 1 s a step, evaluation included.
    folder = Folder(tmp_path / "run").log(line(10), line(20))
    folder.log(line(30, time=5000.0), line(40, time=5010.0))
    environment = folder.write("environment.json", {"world_size": 2, "device": "cpu"})
    os.utime(environment, (4990.0, 4990.0))
    assert watched(folder.path).standing().remaining_s == pytest.approx(60.0)
    # Lines of before there was a time in them: the steps' own.
    old = Folder(tmp_path / "old").log(line(10, time=None), line(20, time=None))
    assert watched(old.path).standing().remaining_s == pytest.approx(40.0)


def test_a_job_that_is_gone_is_told_from_one_that_is_quiet(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run").log(line(10), line(20))
    folder.write("environment.json", {"host": platform.node()})
    lock = folder.write(".lock", "")
    aged(folder.path, 1010.0)
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if f":{lock.stat().st_ino} " not in Path("/proc/locks").read_text():
            pytest.skip("this kernel does not list locks")
        standing = watched(folder.path).standing(now=1310.0)
        assert standing.state == "quiet" and "a job still holds the folder" in standing.words
    standing = watched(folder.path).standing(now=1310.0)
    assert (standing.state, standing.words) == ("ended", "no job holds this folder: it ended after step 20")
    folder.write("environment.json", {"host": "elsewhere"})
    aged(folder.path, 1010.0)
    assert watched(folder.path).standing(now=1310.0).state == "quiet"


def test_numbers_are_told_with_what_is_odd(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run").log(
        line(10, skipped={"broken": 40}, other_language=3, bubble_share=0.6, **{"cmlm_accuracy/zh": 0.25})
    )
    folder.evaluate(5, en=40.0, zh=30.0).evaluate(10, en=41.5, zh=29.0)
    folder.write("restarts.jsonl", '{"step": 4, "reason": "rank 3 was lost"}\n{"step": 8, "reason": "killed"}\n')
    (folder.path / "checkpoints/step-00000008").mkdir(parents=True)
    os.utime(folder.path / "checkpoints/step-00000008", (1940.0, 1940.0))
    run = watched(folder.path)
    found = texts(run)
    for label, text in {
        "objective": "7.9",
        "MFU": "31%",
        "waiting for data": "1.0%",
        "skipped, broken": "40",
        "in another language": "3",
        "words told, zh": "25%",
        "shapes/val/en": "41.5% (+1.5)",
        "shapes/val/zh": "29.0% (-1.0)",
        "checkpoint": "step 8, 60 s ago",
        "restarts": "2, last at step 8: killed",
    }.items():
        assert found[label] == text
    odd = {number.label: number.level for some in groups(run, 0.0).values() for number in some if number.level}
    assert odd == {"skipped, broken": "bad", "pipeline bubble": "warn", "restarts": "warn"}
    folder.log(line(20, loss=None))
    run.refresh()
    assert texts(run)["objective"] == "not finite"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.yaml", "a: [1", "config.yaml is damaged"),
        ("config.yaml", "- 1", "config.yaml is damaged"),
        ("environment.json", "{", "environment.json is damaged"),
        ("evaluation/step-00000005.json", "{", "step-00000005.json is damaged"),
        ("evaluation/step-00000005.json", '{"step": 5}', "step-00000005.json is no evaluation"),
        ("log.jsonl", "\x00\n", "log.jsonl: 1 damaged line(s) left out"),
        ("anomalies.jsonl", "[]\n", "anomalies.jsonl: 1 damaged line(s) left out"),
    ],
)
def test_damage_is_a_note(tmp_path: Path, name: str, content: str, told: str) -> None:
    folder = Folder(tmp_path / "run").log(line(10))
    folder.write(name, content)
    run = watched(folder.path)
    assert any(told in note for note in run.notes), run.notes
    assert terminal.progress(run.standing())
    assert groups(run, 0.0) or name == "log.jsonl"


def test_the_terminal_shows_one_run_or_several(tmp_path: Path) -> None:
    one = Folder(tmp_path / "[red]one").log(*(line(step) for step in range(10, 60, 10)))
    runs = [watched(one.path), watched(tmp_path / "none")]
    for some in (runs[:1], runs):
        out = io.StringIO()
        Console(file=out, width=140).print(terminal.view(some, 2000.0))
        for text in ("[red]one", "step 50 of 100 (50%)", "contrastive, vl", "█▆▅▃▁"[:1], "31%"):
            assert text in out.getvalue()
        assert ("no such folder yet" in out.getvalue()) == (len(some) == 2)
    assert terminal.curve(runs[0], "loss") == "█▆▅▃▁"


def test_the_command_prints_once_and_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path / "run").log(line(10))
    watch((folder.path, tmp_path / "none"))
    out = capsys.readouterr().out
    assert "step 10 of 100 (10%)" in out and "pairs a second" in out and "no such folder yet" in out
    assert "\x1b" not in out and "│" not in out
    with pytest.raises(ValueError, match="at least one run folder"):
        watch(())
    with pytest.raises(ValueError, match="every"):
        watch((folder.path,), every=0)


def test_durations() -> None:
    assert [duration(s) for s in (None, 0.4, 40, 600, 12_000, 200_000)] == [
        *("–", "0.4 s", "40 s", "10 min", "3 h 20 min", "2 d 7 h"),
    ]
