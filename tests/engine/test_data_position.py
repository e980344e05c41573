"""Where a run stands in its data: told by checkpoints and logs, gone on from exactly, refused if the data changed."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from m2_ds.data.batch import PairBatch
from m2_ds.engine.step import ContrastiveStep, StepResult
from m2_ds.parallel.mesh import Mesh
from m2_ds.train import run
from tests.engine.jobs import changed, config_of, log_lines


@pytest.fixture(scope="module")
def whole(solo: Mesh, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 3 steps, 16 pairs each."""
    folder = tmp_path_factory.mktemp("position") / "run"
    run(config_of(changed(recipe, {"folder": str(folder), "steps": 3})), solo)
    return folder


@pytest.fixture
def again(solo: Mesh, recipe: dict[str, Any], whole: Path, tmp_path: Path) -> Callable[..., Path]:
    """Start the job again on a copy, with changed settings."""
    folder = shutil.copytree(whole, tmp_path / "run")

    def start(**changes: Any) -> Path:
        tree = changed(recipe, {"folder": str(folder), "steps": 3})
        run(config_of(changed(tree, {k.replace("__", "."): v for k, v in changes.items()})), solo)
        return folder

    return start


def test_another_global_batch_goes_on_with_the_next_unseen_pair(
    again: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots: list[int] = []
    step = ContrastiveStep.__call__

    def spied(self: ContrastiveStep, batches: Sequence[PairBatch], number: int) -> StepResult:
        slots.extend(sorted(slot for batch in batches for slot in batch.slot.tolist()))
        return step(self, batches, number)

    monkeypatch.setattr(ContrastiveStep, "__call__", spied)
    with caplog.at_level(logging.WARNING):
        again(steps=5, global_batch=10)
    folder = again(steps=6, global_batch=12, micro_batch=3)
    assert "going on with a change: global_batch was 16, is now 10" in caplog.text
    assert slots == list(range(48, 48 + 20 + 12))
    state = json.loads((folder / "checkpoints/step-00000006/state.json").read_text())
    assert state["samples"] == state["stream"]["samples"] == 80
    assert [line["samples"] for line in log_lines(folder)] == [16, 32, 48, 58, 68, 80]
    (source,) = state["stream"]["sources"]
    assert source["pairs"] == 80 and source["epochs"] == log_lines(folder)[-1]["epochs/shapes"] == 80 / 72
    assert (folder / "checkpoints/step-00000006/state.json").stat().st_size < 2000


def test_the_last_line_says_how_many_epochs_were_seen(
    again: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    again(steps=9)
    assert capsys.readouterr().out.splitlines()[-1] == "done: 9 steps, 144 pairs, epochs shapes 2.00"


def test_other_data_is_refused_with_a_remedy(
    again: Callable[..., Path], broken_shapes: Path, shapes: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"other data: data\.sources\.0 .*Put the data sets back.*init_from="):
        again(steps=5, data__sources=[{"path": str(broken_shapes)}])
    with pytest.raises(ValueError, match=r"other data: data\.sources\.1 "):
        again(steps=5, data__sources=[{"path": str(shapes)}, {"path": str(broken_shapes)}])
    moved = shutil.copytree(shapes, tmp_path / "elsewhere")
    again(steps=4, data__sources=[{"path": str(moved)}])
    again(steps=5, data__sources=[{"path": f"file://{moved}"}])


def test_captions_in_another_language_are_counted_through_a_break(
    solo: Mesh, recipe: dict[str, Any], tmp_path: Path
) -> None:
    from dataclasses import replace

    from m2_ds.data.shards import ShardWriter
    from tests.engine.conftest import record

    with ShardWriter(tmp_path / "data", "half") as writer:
        for number in range(32):
            made = record(number, "train")
            writer.add("train", replace(made, captions=made.captions[: 2 if number % 2 else 4]))
    changes = {"data.captions": "one", "data.mixing_window": 32, "data.sources": [{"path": str(tmp_path / "data")}]}
    tree = changed(recipe, {"folder": str(tmp_path / "run"), "steps": 3, **changes})
    run(config_of(tree), solo)
    first = log_lines(tmp_path / "run")[-1]["other_language"]
    assert 0 < first < 24
    run(config_of(changed(tree, {"steps": 5})), solo)
    assert first < log_lines(tmp_path / "run")[-1]["other_language"] < 40
