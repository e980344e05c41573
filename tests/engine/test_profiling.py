"""Traces of some steps: what is in them, which ranks write them, and that numbers stay as they are."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_ds.engine import profiling
from m2_ds.engine.interrupt import Interrupted as Told
from m2_ds.engine.profiling import parse_request
from m2_ds.parallel.mesh import Mesh
from m2_ds.train import run
from m2_ds.watch.command import profile
from tests.engine.jobs import Interrupted, changed, config_of, curve, stopped_after, train_all
from tests.support.ranks import run_ranks


def trace(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def named(events: list[dict[str, Any]], name: str) -> int:
    return sum(event.get("name") == name and event.get("ph") == "X" for event in events)


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in (folder / "profile").rglob("*") if path.is_file())


def test_a_trace_has_the_steps_and_phases_and_changes_no_number(
    solo: Mesh, recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    changes = {"steps": 6, "log": {"every": 2, "profile": {"start": 3, "steps": 2}}}
    run(config_of(changed(recipe, {**changes, "folder": str(tmp_path / "traced")})), solo)
    run(config_of(changed(recipe, {"steps": 6, "log.every": 2, "folder": str(tmp_path / "plain")})), solo)
    assert torch.equal(curve(tmp_path / "traced"), curve(tmp_path / "plain"))
    assert written(tmp_path / "traced") == [f"profile/step-00000003/rank-0000.{end}" for end in ("json.gz", "txt")]
    assert not (tmp_path / "plain/profile").exists()
    events = trace(tmp_path / "traced/profile/step-00000003/rank-0000.json.gz")
    for phase in ("forward", "loss", "backward", "update"):
        assert named(events, f"phase: {phase}") == 2
    assert named(events, "aten::addmm") > 10
    text = (tmp_path / "traced/profile/step-00000003/rank-0000.txt").read_text()
    assert text.startswith("steps 3 to 4, rank 0: ") and text in caplog.text + "\n"
    (addmm,) = (line.split() for line in text.splitlines() if line.startswith("aten::addmm"))
    assert float(addmm[1]) == named(events, "aten::addmm") / 2
    assert "GPU" not in text


def test_a_running_job_is_asked_by_a_file(
    solo: Mesh, recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text("")
    profile(tmp_path, steps=100, ranks="0")
    config = config_of(changed(recipe, {"folder": str(tmp_path), "steps": 6, "log.every": 2}))
    with stopped_after(4), pytest.raises(Interrupted):
        run(config, solo)
    # The job ended by an error: nothing is written, and the profiler of the process is free again.
    assert not (tmp_path / "profile").exists() and not torch._C._autograd._profiler_enabled()
    profile(tmp_path, steps=100)
    run(config, solo)
    assert not (tmp_path / profiling.REQUEST).exists()
    assert written(tmp_path) == [f"profile/step-00000003/rank-0000.{end}" for end in ("json.gz", "txt")]
    events = trace(tmp_path / "profile/step-00000003/rank-0000.json.gz")
    assert named(events, "phase: update") == 4  # to the end of the run


def test_a_wrong_request_is_told_and_the_job_goes_on(
    solo: Mesh, recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(changed(recipe, {"folder": str(tmp_path)}))
    profiler = profiling.Profiler(config, solo, profiling.Clock(solo.device, solo.traffic.activity))
    for wrong, told in (
        ("5 99", "names [99]"),
        ("five", "STEPS RANKS"),
        ("0", "greater than or equal"),
        ("5 ,", "at least 1"),
    ):
        (tmp_path / profiling.REQUEST).write_text(wrong)
        caplog.clear()
        profiler.between(1)
        assert told in caplog.text and not (tmp_path / profiling.REQUEST).exists()
        assert not profiler.clock.marked


def test_an_interrupted_job_writes_what_it_has(solo: Mesh, recipe: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(changed(recipe, {"folder": str(tmp_path), "log.profile": {"start": 2, "steps": 4}}))
    clock = profiling.Clock(solo.device, solo.traffic.activity)
    with pytest.raises(Told), profiling.Profiler(config, solo, clock) as profiler:
        for done in (1, 2, 3):
            profiler.between(done)
            with clock("forward"):
                torch.ones(3) + 1
            if done == 3:
                raise Told(4)
    assert written(tmp_path) == [f"profile/step-00000002/rank-0000.{end}" for end in ("json.gz", "txt")]
    assert (tmp_path / "profile/step-00000002/rank-0000.txt").read_text().startswith("steps 2 to 4, rank 0: ")
    assert named(trace(tmp_path / "profile/step-00000002/rank-0000.json.gz"), "phase: forward") == 3
    assert not clock.marked


def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    solo: Mesh, recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("a file where the folder has to be")
    changes = {"steps": 4, "log": {"every": 2, "profile": {"start": 2, "steps": 1}}}
    run(config_of(changed(recipe, {**changes, "folder": str(tmp_path)})), solo)
    assert "the trace of rank 0 could not be written" in caplog.text and len(curve(tmp_path)) == 2


def test_requests() -> None:
    assert parse_request("").steps == 5 and parse_request("\n").ranks == [0]
    assert parse_request("7").steps == 7
    assert parse_request("7 all").takes(31) and parse_request("7 0,3").ranks == [0, 3]
    for wrong in ("7 0 3", "seven", "7 0-3", "-1", "101"):
        with pytest.raises(ValueError):
            parse_request(wrong)


def test_wrong_settings_are_told(solo: Mesh, recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log.profile.start 9 lies behind the last step, 8"):
        config_of(changed(recipe, {"log.profile": {"start": 9}}))
    config = config_of(changed(recipe, {"folder": str(tmp_path), "log.profile": {"start": 2, "ranks": [0, 4]}}))
    with pytest.raises(ValueError, match=r"names \[4\]; this job has ranks 0 to 0"):
        run(config, solo)
    with pytest.raises(ValueError, match="no run folder"):
        profile(tmp_path / "none")


@pytest.mark.distributed
def test_ranks_that_are_asked_start_before_the_same_step(recipe: dict[str, Any], tmp_path: Path) -> None:
    changes = {"steps": 6, "log": {"every": 1, "profile": {"start": 5, "steps": 2, "ranks": [1]}}}
    tree = changed(recipe, {**changes, "folder": str(tmp_path)})
    (tmp_path / profiling.REQUEST).write_text("2 all")
    for errors in run_ranks(2, train_all, [tree]):
        assert errors == [None]
    ends = ("json.gz", "txt")
    expected = [f"profile/step-00000002/rank-000{rank}.{end}" for rank in (0, 1) for end in ends]
    assert written(tmp_path) == expected + [f"profile/step-00000005/rank-0001.{end}" for end in ends]
    counts = [named(trace(tmp_path / name), "phase: exchange") for name in written(tmp_path) if name.endswith("gz")]
    assert counts == [2, 2, 2]
