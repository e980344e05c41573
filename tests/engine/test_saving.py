"""Checkpoints beside training: the same files as at once, one at a time, never half; and what a failure does."""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from m2_ds.convert.run_folder import checkpoint_steps, newest_good
from m2_ds.engine import checkpoint
from m2_ds.parallel.mesh import Mesh
from m2_ds.train import run
from tests.engine.jobs import attempt, changed, compare_checkpoints, config_of, exact_part, log_lines, train_all
from tests.engine.test_checkpoint import small_files
from tests.support.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"engine.deepspeed": "zero0"},
    "zero0 bf16": {"engine.deepspeed": "zero0", "engine.precision": "bf16"},
    "muon": {"engine.deepspeed": "zero0", "optim.kind": "muon"},
    "zero1": {"engine.deepspeed": "zero1"},
    "zero2 bf16": {"engine.deepspeed": "zero2", "engine.precision": "bf16"},
    "zero3": {"engine.deepspeed": "zero3"},
    "zero3 bf16 offload": {"engine.deepspeed": "zero3_offload", "engine.precision": "bf16"},
    "tensor": {"engine.deepspeed": "zero1", "parallel.tensor_parallel_size": 2},
    "pipeline": {"engine.deepspeed": "zero1", "engine.precision": "bf16", "parallel.pipeline_parallel_size": 2},
}


def files(folder: Path) -> dict[str, bytes]:
    """Of a checkpoint, but for the run's own configuration and what depends on it."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name not in ("config.yaml", "checksums.json")}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_the_files_are_those_of_a_checkpoint_written_at_once(
    recipe: dict[str, Any], deepspeed_files: dict[str, Path], tmp_path: Path
) -> None:
    trees = []
    for name, changes in LAYOUTS.items():
        own = {**changes, "engine.deepspeed": str(deepspeed_files[changes["engine.deepspeed"]])}
        for asynchronous in (False, True):
            where = {"folder": str(tmp_path / name / str(asynchronous)), "checkpoint.asynchronous": asynchronous}
            trees.append(changed(recipe, {**own, **where, "steps": 4, "checkpoint.every": 2, "optim.rules": []}))
    for errors in run_ranks(2, train_all, trees, seconds=500):
        assert errors == [None] * len(trees), errors
    for name in LAYOUTS:
        for step in (2, 4):
            at_once, beside = (files(tmp_path / name / x / f"checkpoints/step-{step:08}") for x in ("False", "True"))
            assert len(at_once) > 6 and at_once.keys() == beside.keys(), name
            assert [file for file in at_once if at_once[file] != beside[file]] == [], name


@pytest.fixture(scope="module")
def tree(recipe: dict[str, Any]) -> dict[str, Any]:
    return changed(recipe, {"steps": 6, "checkpoint": {"every": 2, "keep": 9, "asynchronous": True}})


@pytest.fixture(scope="module")
def whole(solo: Mesh, tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose checkpoints after steps 2, 4, 6 were written at once."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(config_of(changed(tree, {"folder": str(folder), "checkpoint.asynchronous": False})), solo)
    return folder


def slow_write(monkeypatch: pytest.MonkeyPatch, seconds: float, under_way: list[int]) -> None:
    """Writing takes as long, and tells how many were under way when it began."""
    original, lock, count = checkpoint._write, threading.Lock(), 0

    def write(*arguments: Any) -> Path:
        nonlocal count
        with lock:
            count += 1
            under_way.append(count)
        time.sleep(seconds)
        try:
            return original(*arguments)
        finally:
            with lock:
                count -= 1

    monkeypatch.setattr(checkpoint, "_write", write)


def test_one_is_written_at_a_time_and_the_wait_is_told(
    solo: Mesh,
    tree: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    under_way: list[int] = []
    slow_write(monkeypatch, 1.0, under_way)
    with caplog.at_level(logging.INFO):
        run(config_of(changed(tree, {"folder": str(tmp_path / "run")})), solo)
    assert under_way == [1, 1, 1]
    assert caplog.text.count("for the checkpoint before") == 2 and caplog.text.count("written beside training") == 3
    for step in (2, 4, 6):
        name = f"checkpoints/step-{step:08}"
        assert files(tmp_path / "run" / name) == files(whole / name)
    assert exact_part(log_lines(tmp_path / "run")) == exact_part(log_lines(whole))
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def killed_while_it_writes(mesh: Mesh, tree: dict[str, Any]) -> None:
    """`kill -9` by the thread that writes the second checkpoint, while training is at a later step."""
    original = checkpoint.write_config

    def kill(*arguments: Any) -> None:
        if checkpoint_steps(Path(tree["folder"]) / "checkpoints"):
            time.sleep(1.0)
            assert threading.current_thread() is not threading.main_thread()
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)

    checkpoint.write_config = kill  # type: ignore[assignment]
    run(config_of(tree), mesh)


@pytest.mark.distributed
def test_a_job_killed_while_it_writes_goes_on_from_the_older_one(
    solo: Mesh, tree: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    job = changed(tree, {"folder": str(tmp_path / "run")})
    with pytest.raises(RuntimeError, match="died with \\[-9\\]"):
        run_ranks(1, killed_while_it_writes, job)
    folder = tmp_path / "run/checkpoints"
    assert checkpoint_steps(folder) == [2] and newest_good(folder) is not None
    assert [path.name for path in folder.glob(".*")] == [".step-00000004.part"]
    assert [line["step"] for line in log_lines(tmp_path / "run")][-1] > 4 or len(log_lines(tmp_path / "run")) == 4
    run(config_of(job), solo)
    compare_checkpoints(folder / "step-00000006", whole / "checkpoints/step-00000006")
    assert exact_part(log_lines(tmp_path / "run")) == exact_part(log_lines(whole))


# -- writing that fails ------------------------------------------------------------------------------------------------


def fail(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The checkpoints behind these steps meet with a full disk."""
    original = checkpoint._write_part

    def full(writer: Any, folder: Path, *rest: Any) -> None:
        if any(f"step-{step:08}" in str(folder) for step in steps):
            with small_files(20_000):  # log lines fit
                original(writer, folder, *rest)
                writer.finish()
        else:
            original(writer, folder, *rest)

    monkeypatch.setattr(checkpoint, "_write_part", full)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_past_a_failed_checkpoint_and_tries_again(
    solo: Mesh,
    tree: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asynchronous: bool,
) -> None:
    fail(monkeypatch, {4})
    own = {"folder": str(tmp_path), "checkpoint.asynchronous": asynchronous, "checkpoint.keep": 1}
    run(config_of(changed(tree, own)), solo)
    assert "step-00000004 could not be written" in caplog.text and "failure 1 in a row, 2 are allowed" in caplog.text
    assert checkpoint_steps(tmp_path / "checkpoints") == [6]
    compare_checkpoints(tmp_path / "checkpoints/step-00000006", whole / "checkpoints/step-00000006")
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("failing", "allowed", "left"), [({2}, 2, []), ({4, 6}, 0, [2]), ({4, 6, 8}, 1, [2]), ({8}, 2, [6])]
)
def test_it_ends_where_there_is_none_yet_or_too_many_failed_or_it_was_the_last(
    solo: Mesh,
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
    failing: set[int],
    allowed: int,
    left: list[int],
) -> None:
    fail(monkeypatch, failing)
    block = {"every": 2, "keep": 1, "asynchronous": asynchronous, "failures_allowed": allowed}
    ends = min(failing) + 2 * (allowed if left and failing != {8} else 0)
    with pytest.raises(ValueError, match=f"step-{ends:08} could not be written.*free space"):
        run(config_of(changed(tree, {"folder": str(tmp_path), "steps": 8, "checkpoint": block})), solo)
    assert checkpoint_steps(tmp_path / "checkpoints") == left


def one_rank_fails(mesh: Mesh, tree: dict[str, Any]) -> Any:
    """Rank 1 cannot write its files of the checkpoint behind step 4."""
    from m2_ds.convert import canonical

    original = canonical.save_file

    def full(tensors: Any, path: Path, **options: Any) -> None:
        if mesh.rank == 1 and "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        original(tensors, path, **options)

    canonical.save_file = full
    return attempt(mesh, tree)


@pytest.mark.distributed
def test_a_rank_that_alone_cannot_write_is_heard_by_all(tree: dict[str, Any], tmp_path: Path) -> None:
    assert run_ranks(2, one_rank_fails, changed(tree, {"folder": str(tmp_path)})) == [None, None]
    assert sorted(checkpoint_steps(tmp_path / "checkpoints")) == [2, 6]
