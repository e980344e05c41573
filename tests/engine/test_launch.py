"""The job as users start it: both launchers, and that an error on one rank ends all of it, soon and with its reason."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from m2_ds.convert.run_folder import checkpoint_steps
from tests.engine.conftest import LAUNCHER_SETS
from tests.engine.jobs import changed, curve, log_lines, weights

ROOT = Path(__file__).parents[2]
SECONDS = 120.0


def launcher(name: str) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    if name == "deepspeed":
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, "--module"]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, "-m"]


def start(name: str, module: str, tree: dict[str, Any], folder: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output of a job of two ranks; fails if it takes too long or leaves a process behind."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(yaml.safe_dump(changed(tree, {"folder": str(folder)})))
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHER_SETS}
    process = subprocess.Popen(
        [*launcher(name), module, "--config", str(config)],
        cwd=ROOT,
        env={**clean, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        left = ranks_of(str(config))
        for rank in left:
            rank.kill()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert not left, "ranks outlived their launcher"
    return process.returncode, output


def ranks_of(config: str) -> list[psutil.Process]:
    """Processes of the job a few seconds after its launcher ended."""
    for _ in range(50):
        found = [p for p in psutil.process_iter(["cmdline", "status"]) if config in (p.info["cmdline"] or [])]
        found = [p for p in found if p.info["status"] != psutil.STATUS_ZOMBIE]
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def tree(recipe: dict[str, Any]) -> dict[str, Any]:
    return changed(recipe, {"steps": 4, "checkpoint": {"every": 2, "keep": 9}})


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_a_launcher_trains(tree: dict[str, Any], tmp_path: Path, name: str) -> None:
    code, output = start(name, "m2_ds.train", changed(tree, {"data.workers": 1}), tmp_path / "run")
    assert code == 0, output
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert sorted(checkpoint_steps(tmp_path / "run/checkpoints")) == [2, 4]
    # The same numbers as anywhere else: the first loss of test_exact.py's runs.
    assert curve(tmp_path / "run")[0] == pytest.approx(5.2588, abs=1e-4)
    assert "step 4/4" in output and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.distributed
def test_groups_and_micro_batches_by_the_launcher(tree: dict[str, Any], tmp_path: Path) -> None:
    """Each rank on its own, in two micro-batches; and a node is what the launcher says it is."""
    settings = {"micro_batch": 4, "parallel.contrast_group": {"size": 1}, "log.every": 2}
    code, output = start("deepspeed", "m2_ds.train", changed(tree, settings), tmp_path / "run")
    assert code == 0, output
    assert "contrast: 2 group(s) of 1 data-parallel rank(s), contiguous, over gloo" in output
    line = log_lines(tmp_path / "run")[-1]
    assert line["contrastive_batch"] == 8 and line["seconds/recompute"] > 0
    assert line["sent_mb/gradients"] > 0 and "sent_mb/features" not in line
    node = changed(tree, {"parallel.contrast_group": {"nodes": 2}})
    code, output = start("torchrun", "m2_ds.train", node, tmp_path / "other")
    assert code != 0 and "nodes 2 does not divide 1 nodes; use one of [1]" in output


@pytest.mark.distributed
def test_a_wrong_setting_is_told_once(tree: dict[str, Any], tmp_path: Path) -> None:
    code, output = start("deepspeed", "m2_ds.train", changed(tree, {"global_batch": 17}), tmp_path / "run")
    assert code == 2
    assert output.count("global_batch 17 does not divide over 2 data-parallel ranks; use 16 or 18") == 1
    assert "Traceback" not in output


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_ends_the_job(tree: dict[str, Any], tmp_path: Path) -> None:
    job = changed(tree, {"optim.lr": 1e30, "steps": 9, "checkpoint.every": 1, "log.every": 50})
    code, output = start("deepspeed", "m2_ds.train", job, tmp_path / "run")
    assert code == 2
    assert output.count("not finite. Lower optim.lr") == 1 and "Traceback" not in output
    for step in checkpoint_steps(tmp_path / "run/checkpoints"):
        assert all(weight.isfinite().all() for weight in weights(tmp_path / "run", step).values())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("deepspeed", "value", "m2_ds.train, rank 1: slot 41: no usable pair in 11 tries"),
        ("torchrun", "crash", "RuntimeError: something that nobody thought of"),
        ("torchrun", "disk", "rank 1: Error while serializing: I/O error: File too large"),
    ],
)
def test_an_error_on_one_rank_ends_the_job_with_its_reason(
    tree: dict[str, Any], tmp_path: Path, name: str, fault: str, words: str
) -> None:
    code, output = start(name, "tests.engine.faulty", tree, tmp_path / "run", M2_FAULT=fault)
    assert code != 0
    assert re.search(re.escape(words), output), output
    assert checkpoint_steps(tmp_path / "run/checkpoints") == ([] if fault == "disk" else [2])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_deepspeed_can_build_its_own_operations(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deepspeed_files: dict[str, Path]
) -> None:
    """Compiles the shared-memory collectives (g++, ninja); two minutes where that was never done."""
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 800.0)
    changes = {"steps": 2, "optim.schedule.warmup_steps": 1, "engine.build_ops": True}
    job = changed(tree, {**changes, "engine.deepspeed": str(deepspeed_files["zero2"])})
    code, output = start("deepspeed", "m2_ds.train", job, tmp_path / "run", TORCH_EXTENSIONS_DIR=str(tmp_path / "ops"))
    assert code == 0, output
    assert curve(tmp_path / "run")[0] == pytest.approx(5.2588, abs=1e-4)
    assert list((tmp_path / "ops").rglob("*.so"))
