"""A job that is told to end stops behind one step on all ranks, with a checkpoint, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from m2_ds.convert.run_folder import checkpoint_steps
from m2_ds.engine.interrupt import EXIT_CODE, Interrupted, Interruption
from m2_ds.parallel.collectives import barrier
from m2_ds.parallel.mesh import Mesh
from tests.engine.conftest import LAUNCHER_SETS
from tests.engine.jobs import attempt, changed, compare_checkpoints, config_of, curve, log_lines
from tests.engine.test_launch import ROOT, ranks_of
from tests.support.ranks import run_ranks

TOLD = {0: 5, 1: 5, 2: 6}  # rank -> the step behind which it gets a signal; two at once, one a step later


def steps_until_due(mesh: Mesh, told: dict[int, int]) -> int:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with Interruption(mesh, 0) as interruption:
            for step in range(20):
                barrier(mesh.world)  # as a step's gradients do
                if told.get(mesh.rank) == step:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    time.sleep(0.01)
                if interruption.due(step + 1):
                    raise Interrupted(step + 1)
    except Interrupted:
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN  # its last lines are not cut short
        signal.signal(signal.SIGUSR1, before)
        return step + 1
    assert signal.getsignal(signal.SIGUSR1) is before
    return 0


@pytest.mark.distributed
@pytest.mark.parametrize("told", [{2: 5}, TOLD, {}])
def test_all_ranks_stop_behind_the_same_step(told: dict[int, int]) -> None:
    stopped = run_ranks(3, steps_until_due, told)
    assert len(set(stopped)) == 1
    assert stopped[0] == (min(told.values()) + 2 if told else 0)


def interrupted_run(mesh: Mesh, tree: dict[str, Any]) -> list[Any]:
    """The run to its interruption (rank 1 gets the signal in the third step), and then to its end."""
    from m2_ds.engine.step import ContrastiveStep
    from m2_ds.train import run

    original, done = ContrastiveStep.__call__, 0

    def call(self: ContrastiveStep, batches: Any, step: int = 0) -> Any:
        nonlocal done
        done += 1
        if done == 3 and mesh.rank == mesh.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches, step)

    ContrastiveStep.__call__ = call  # type: ignore[method-assign]
    try:
        run(config_of(tree), mesh)
        return ["not interrupted"]
    except Interrupted as error:
        first = str(error)
    finally:
        ContrastiveStep.__call__ = original  # type: ignore[method-assign]
    steps = sorted(checkpoint_steps(Path(tree["folder"]) / "checkpoints"))
    return [first, steps, attempt(mesh, tree)]


@pytest.mark.distributed
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(recipe: dict[str, Any], tmp_path: Path) -> None:
    trees = [changed(recipe, {"folder": str(tmp_path / name), "log.every": 3}) for name in ("plain", "cut")]
    assert run_ranks(2, attempt, trees[0]) == [None, None]
    for first, steps, second in run_ranks(2, interrupted_run, trees[1]):
        assert "behind step 4," in first and steps == [4] and second is None
    compare_checkpoints(*(tmp_path / name / "checkpoints/step-00000008" for name in ("plain", "cut")))
    assert [line["step"] for line in log_lines(tmp_path / "cut")] == [3, 4, 6, 8]
    assert torch.equal(curve(tmp_path / "cut")[-1:], curve(tmp_path / "plain")[-1:])


@pytest.mark.distributed
def test_alone_the_signal_is_enough(solo: Mesh) -> None:
    with Interruption(solo, 0) as interruption:
        assert not interruption.due(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.due(2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_command_passes_a_signal_on_and_goes_on(recipe: dict[str, Any], tmp_path: Path, number: int) -> None:
    config, folder = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(changed(recipe, {"folder": str(folder), "steps": 2000, "log.every": 1})))
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHER_SETS}
    command = [sys.executable, "-m", "m2_ds.cli", "train", str(config)]
    environment = {**clean, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def until(lines: int, *more: str) -> tuple[int, str]:
        """Told to end when the log has so many lines; exit code and output."""
        process = subprocess.Popen(
            [*command, *more], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            for _ in range(1200):
                if (folder / "log.jsonl").exists() and len(log_lines(folder)) >= lines:
                    break
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(number)
            output, _ = process.communicate(timeout=60)
        finally:
            for left in ranks_of(str(config)):
                left.kill()
            if process.poll() is None:
                psutil.Process(process.pid).kill()
        return process.returncode, output

    code, output = until(5)
    assert code == EXIT_CODE and "whose checkpoint is written; the same command goes on" in output, output
    (newest,) = checkpoint_steps(folder / "checkpoints")
    assert 5 <= newest < 2000 and log_lines(folder)[-1]["step"] == newest
    code, output = until(newest + 3)
    assert code == EXIT_CODE and f"going on after step {newest} of 2000" in output, output
    assert [line["step"] for line in log_lines(folder)] == list(range(1, log_lines(folder)[-1]["step"] + 1))
