"""The run folder's disk: every trouble is told, and nothing is left behind."""

import fcntl
import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from m2_ds.config import RunConfig
from m2_ds.doctor import disk
from m2_ds.doctor.check import run_all
from m2_ds.doctor.sizes import checkpoint_bytes, kept_checkpoints, numbers, state_bytes
from m2_ds.model.encoder import canonical_shapes
from m2_ds.parallel.config import Layout
from tests.engine.jobs import changed, config_of

Usage = namedtuple("Usage", "total used free")


def test_a_good_disk_is_green_and_stays_as_it_was(config: RunConfig, tmp_path: Path) -> None:
    results = run_all(disk.checks(config))
    assert [result.status for result in results] == ["ok"] * 4, results
    assert not list(tmp_path.rglob("*"))


def test_run_folder(config: RunConfig, tree: dict[str, Any]) -> None:
    assert "a new run" in disk.run_folder(config).found
    (config.folder / "checkpoints/step-00000004").mkdir(parents=True)
    assert "goes on after step 4 of 8" in disk.run_folder(config).found
    with (config.folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "another job is writing" in disk.run_folder(config).found
    (config.folder / "checkpoints/step-00000008").mkdir()
    assert disk.run_folder(config).status == "warn"
    file = config.folder / "file"
    file.touch()
    assert "is a file" in disk.run_folder(config_of(changed(tree, {"folder": str(file)}))).found
    check = disk.Check("disk", "run folder", lambda: disk.run_folder(config_of(changed(tree, {"folder": "/proc/m2"}))))
    assert "cannot be written to" in check.run().found and "folder=" in check.run().remedy


def test_space(config: RunConfig, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    need = kept_checkpoints(config) * checkpoint_bytes(numbers(config))
    for free, status in ((2 * need, "ok"), (1.1 * need, "warn"), (0.9 * need, "fail")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(1e12, 0, free))
        assert disk.space(config).status == status
    # What is there of the run already needs no more room.
    (config.folder / "checkpoints/step-00000004").mkdir(parents=True)
    (config.folder / "checkpoints/step-00000004/model").write_bytes(bytes(int(need)))
    assert disk.space(config).status == "ok"


@pytest.mark.parametrize(
    ("checkpoint", "count"),
    [
        ({"every": 0}, 1), ({"every": 2, "keep": 2}, 3), ({"every": 2, "keep": 9}, 4),
        ({"every": 1, "keep": 1, "keep_every": 4}, 4),
    ],
)  # fmt: skip
def test_checkpoints_that_lie_there_at_once(tree: dict[str, Any], checkpoint: dict[str, int], count: int) -> None:
    assert kept_checkpoints(config_of(changed(tree, {"checkpoint": checkpoint}))) == count


def test_numbers_of_a_run(config: RunConfig, tree: dict[str, Any]) -> None:
    found = numbers(config)
    assert found.weights == sum(map(math.prod, canonical_shapes(config.model).values()))
    assert found.trained < found.weights and found.states == 2 * found.trained
    frozen = numbers(config_of(changed(tree, {"optim.rules": [{"pattern": "backbone", "freeze": True}]})))
    assert frozen.weights == found.weights and frozen.trained < found.trained
    layout = Layout(2, 4, 1)
    whole = state_bytes(config, found, Layout(1, 1, 1), 0)
    assert whole == 4 * found.weights + 4 * found.trained + 4 * found.states
    assert state_bytes(config, found, layout, 1) == pytest.approx(
        (4 * found.weights + 4 * found.trained + found.states) / 2
    )
    assert state_bytes(config, found, layout, 3) == pytest.approx(whole / 8)


def test_a_slow_disk_is_told(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SLOW_CHECKPOINT_S", 1e-9)
    verdict = disk.speed(config)
    assert verdict.status == "warn" and "checkpoint.every" in verdict.remedy


@pytest.mark.parametrize(("apart", "status"), [(0.5, "ok"), (9.0, "warn"), (-9.0, "warn"), (4000.0, "fail")])
def test_the_clock_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: float, status: str) -> None:
    now = disk.time.time
    monkeypatch.setattr(disk.time, "time", lambda: now() + apart)
    assert disk.file_clock(tmp_path).status == status


def test_data_cache(tree: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(changed(tree, {"data.cache_folder": str(tmp_path / "cache"), "data.cache_gb": 1e9}))
    assert disk.data_cache(config).status == "fail"
    small = config_of(changed(tree, {"data.cache_folder": str(tmp_path / "cache"), "data.cache_gb": 1e-6}))
    assert disk.data_cache(small).status == "ok"
    assert disk.checks(small)[-1].name == "data cache"
