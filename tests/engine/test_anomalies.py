"""A step whose gradient is not finite, or far off: left out, gone back from, or the end of the run; and its record."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from m2_ds.config import AnomaliesConfig
from m2_ds.convert.canonical import read_weights
from m2_ds.convert.run_folder import ADAPTER
from m2_ds.data.stream import build_loader
from m2_ds.data.text import load_tokenizer
from m2_ds.engine.anomalies import LEFT_OUT, RECORDS, spiked
from m2_ds.engine.step import ContrastiveStep
from m2_ds.model.lora import read_adapters
from m2_ds.parallel.mesh import Mesh
from m2_ds.train import run
from tests.engine.jobs import (
    Interrupted,
    attempt,
    changed,
    compare_checkpoints,
    config_of,
    exact_part,
    log_lines,
    parts,
    same,
    stopped_after,
)
from tests.support.ranks import run_ranks


@contextmanager
def planted(faults: dict[int, float], rank: int = 0, of_rank: int = 0) -> Iterator[None]:
    """The gradients that a rank starts pass 2 from are multiplied in the batches that begin at these slots."""
    call, gradients = ContrastiveStep.__call__, ContrastiveStep._gradients
    factor = 1.0

    def noted(self: ContrastiveStep, batches: Any, step: int = 0) -> Any:
        nonlocal factor
        factor = faults.get(int(batches[0].slot[0]), 1.0) if rank == of_rank else 1.0
        return call(self, batches, step)

    def spoilt(self: ContrastiveStep, *arguments: Any) -> Any:
        found = gradients(self, *arguments)
        for forward in found:
            forward.features[:] = [x * factor for x in forward.features]
        return found

    ContrastiveStep.__call__, ContrastiveStep._gradients = noted, spoilt  # type: ignore[method-assign]
    try:
        yield
    finally:
        ContrastiveStep.__call__, ContrastiveStep._gradients = call, gradients  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def tree(recipe: dict[str, Any]) -> dict[str, Any]:
    """The learning rate does not depend on the number of steps: one that is left out leaves no trace."""
    schedule = {"kind": "constant", "warmup_steps": 2, "cooldown_share": 0.0}
    return changed(recipe, {"optim.schedule": schedule, "checkpoint.every": 2, "checkpoint.keep": 9})


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RECORDS).read_text(encoding="utf-8").splitlines()]


def equal_numbers(one: Path, other: Path) -> None:
    for part in parts(one):
        assert (name := same(read_weights(one / part), read_weights(other / part))) is None, f"{part}: {name}"


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_skipped_step_is_as_if_it_had_not_been(
    solo: Mesh, tree: dict[str, Any], tmp_path: Path, factor: float
) -> None:
    own = {"folder": str(tmp_path / "skip"), "steps": 6, "anomalies.policy": "skip"}
    with planted({32: factor}):
        run(config_of(changed(tree, own)), solo)
    without = tmp_path / "without"
    without.mkdir()
    (without / LEFT_OUT).write_text("[32]")
    run(config_of(changed(tree, {"folder": str(without), "steps": 5})), solo)
    equal_numbers(tmp_path / "skip/checkpoints/step-00000006", without / "checkpoints/step-00000005")
    lines = log_lines(tmp_path / "skip")
    assert [line["updates_skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[2]["loss"] is None and all(line["loss"] > 0 for line in lines[:2] + lines[3:])
    assert [line["loss"] for line in lines[:2] + lines[3:]] == [line["loss"] for line in log_lines(without)]
    state = json.loads((tmp_path / "skip/checkpoints/step-00000006/state.json").read_text())
    assert state["updates"] == 5 and state["samples"] == 96 and state["anomalies"]["skipped"] == 1
    (found,) = records(tmp_path / "skip")
    assert (found["step"], found["kind"], found["policy"], found["samples"]) == (3, "not finite", "skip", 32)
    config = config_of(changed(tree, own))
    loader = build_loader(
        config.data, load_tokenizer(config.tokenizer), global_batch=16, micro_batch=16, seed=3, start_sample=32
    )
    batch = next(iter(loader))
    assert found["ranks"][0]["keys"] == batch.keys and found["ranks"][0]["slots"] == list(range(32, 48))
    assert len(found["ranks"][0]["loss"]) == 16 and found["loss"] > 0


def test_the_first_step_may_be_skipped(solo: Mesh, tree: dict[str, Any], tmp_path: Path) -> None:
    with planted({0: math.nan}):
        run(config_of(changed(tree, {"folder": str(tmp_path / "skip"), "steps": 4, "anomalies.policy": "skip"})), solo)
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / LEFT_OUT).write_text("[0]")
    run(config_of(changed(tree, {"folder": str(tmp_path / "without"), "steps": 3})), solo)
    equal_numbers(tmp_path / "skip/checkpoints/step-00000004", tmp_path / "without/checkpoints/step-00000003")


def test_too_many_in_a_row_end_the_run(solo: Mesh, tree: dict[str, Any], tmp_path: Path) -> None:
    block = {"policy": "skip", "most_in_a_row": 2}
    with planted(dict.fromkeys(range(16, 128, 16), math.nan)), pytest.raises(FloatingPointError, match="3th in a row"):
        run(config_of(changed(tree, {"folder": str(tmp_path), "anomalies": block})), solo)
    assert [found["step"] for found in records(tmp_path)] == [2, 3, 4]


def test_a_run_that_stops_tells_its_samples(solo: Mesh, tree: dict[str, Any], tmp_path: Path) -> None:
    with planted({48: math.nan}), pytest.raises(FloatingPointError, match=r"step 4 is not finite.*m2 replay RUN"):
        run(config_of(changed(tree, {"folder": str(tmp_path), "log.every": 5, "checkpoint.every": 5})), solo)
    (found,) = records(tmp_path)
    assert found["step"] == 4 and found["ranks"][0]["slots"] == list(range(48, 64)) and found["grad_norm"] is None


def test_a_roll_back_leaves_the_batch_out_then_and_at_every_start(
    solo: Mesh, tree: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"folder": str(tmp_path / "back"), "anomalies.policy": "roll_back", "checkpoint.asynchronous": True}
    with planted({80: math.nan}):
        run(config_of(changed(tree, own)), solo)
    assert "gone back to the checkpoint behind step 4, without the batch of step 6" in caplog.text
    assert json.loads((tmp_path / "back" / LEFT_OUT).read_text()) == [80]
    without = tmp_path / "without"
    without.mkdir()
    (without / LEFT_OUT).write_text("[80]")
    run(config_of(changed(tree, {"folder": str(without)})), solo)
    equal_numbers(tmp_path / "back/checkpoints/step-00000008", without / "checkpoints/step-00000008")
    mine, plain = log_lines(tmp_path / "back"), log_lines(without)
    for line in mine:
        del line["updates_skipped"]
    assert exact_part(mine) == exact_part(plain)
    assert [line["samples"] for line in plain] == [16, 32, 48, 64, 80, 112, 128, 144]
    # What the checkpoint knows is enough for another start.
    (without / LEFT_OUT).unlink()
    shutil.rmtree(without / "checkpoints/step-00000008")
    run(config_of(changed(tree, {"folder": str(without)})), solo)
    assert exact_part(log_lines(without)) == exact_part(plain)


def test_a_roll_back_that_does_not_help_ends_the_run(solo: Mesh, tree: dict[str, Any], tmp_path: Path) -> None:
    block = {"policy": "roll_back", "most_in_a_row": 2}
    faults = dict.fromkeys(range(64, 256, 16), math.nan)
    with planted(faults), pytest.raises(FloatingPointError, match="gone back to one checkpoint 3 times"):
        run(config_of(changed(tree, {"folder": str(tmp_path), "anomalies": block})), solo)
    with planted({0: math.nan}), pytest.raises(FloatingPointError, match="no checkpoint to go back to"):
        run(config_of(changed(tree, {"folder": str(tmp_path / "none"), "anomalies": block})), solo)


def test_a_spike_is_told_from_what_came_before() -> None:
    config = AnomaliesConfig(spike_threshold=10, spike_window=10)
    calm = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.1, 0.9, 1.0]  # median 1, median deviation 0.1
    limit = 1.0 + 10 * 1.4826 * 0.1
    assert not spiked(limit - 1e-6, calm, config) and spiked(limit + 1e-6, calm, config)
    assert not spiked(1e9, calm[:9], config)  # not enough to compare with
    assert not spiked(1e9, calm, AnomaliesConfig(spike_window=10))
    assert not spiked(1.4, [1.0] * 10, config) and spiked(1.6, [1.0] * 10, config)  # at least 5% of the median


def test_a_spike_is_left_out_and_what_it_is_compared_with_survives_a_restart(
    solo: Mesh, tree: dict[str, Any], tmp_path: Path
) -> None:
    block = {"policy": "skip", "spike_threshold": 50, "spike_window": 10}
    own = changed(tree, {"steps": 14, "checkpoint.every": 11, "anomalies": block, "optim.lr": 1e-4})
    faults = {16 * 5: 1e4, 16 * 12: 1e4}  # in step 6 the window is not full yet
    with planted(faults):
        run(config_of(changed(own, {"folder": str(tmp_path / "whole")})), solo)
        with pytest.raises(Interrupted), stopped_after(12):
            run(config_of(changed(own, {"folder": str(tmp_path / "cut")})), solo)
        run(config_of(changed(own, {"folder": str(tmp_path / "cut")})), solo)
    for name in ("whole", "cut"):
        (found,) = records(tmp_path / name)
        assert (found["step"], found["kind"]) == (13, "spike") and found["grad_norm"] > 100 * found["median_norm"]
    compare_checkpoints(*(tmp_path / name / "checkpoints/step-00000014" for name in ("whole", "cut")))


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0 bf16": {"engine.deepspeed": "zero0", "engine.precision": "bf16"},
    "zero0": {"engine.deepspeed": "zero0"},
    "zero2 bf16": {"engine.deepspeed": "zero2", "engine.precision": "bf16"},
    "zero2 offload": {"engine.deepspeed": "zero2_offload"},
    "zero3 bf16": {"engine.deepspeed": "zero3", "engine.precision": "bf16"},
    "tensor bf16": {"engine.deepspeed": "zero1", "engine.precision": "bf16", "parallel.tensor_parallel_size": 2},
    "pipeline": {"engine.deepspeed": "zero1", "parallel.pipeline_parallel_size": 2},
    "pipeline bf16": {
        "engine.deepspeed": "zero1",
        "engine.precision": "bf16",
        "parallel.pipeline_parallel_size": 2,
    },
}


GONE_BACK = ("zero2 bf16", "zero3 bf16", "pipeline bf16")


def with_faults(mesh: Mesh, trees: list[dict[str, Any]]) -> list[str | None]:
    """Batch 2 of every run has gradients that are not finite on the last rank, batch 3 gradients that are far off."""
    found = []
    for tree in trees:
        first = tree["parallel"]["pipeline_parallel_size"] == 1 and tree["parallel"]["tensor_parallel_size"] == 1
        own = 8 if first else 0  # the last rank's slots begin there
        faults = {} if "without" in tree["folder"] else {32 + own: math.nan, 192 + own: 1e4}
        with planted(faults, mesh.rank, mesh.world_size - 1):
            found.append(attempt(mesh, tree))
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_every_layout_leaves_the_step_out(
    tree: dict[str, Any], deepspeed_files: dict[str, Path], tmp_path: Path, policy: str
) -> None:
    trees, ends = [], {"skip": 15, "roll_back": 13}
    layouts = LAYOUTS if policy == "skip" else {name: LAYOUTS[name] for name in GONE_BACK}
    for name, changes in layouts.items():
        own = {"parallel.tensor_parallel_size": 1, "parallel.pipeline_parallel_size": 1, **changes}
        own |= {"engine.deepspeed": str(deepspeed_files[changes["engine.deepspeed"]]), "optim.rules": []}
        block = {"policy": policy, "spike_threshold": 50, "spike_window": 10}
        own |= {"anomalies": block, "optim.lr": 1e-4, "checkpoint.every": 2}
        for kind in (policy, "without"):
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            steps = ends[policy] if kind == policy else 13
            if kind == "without":
                (folder / LEFT_OUT).write_text("[32, 192]")
            trees.append(changed(tree, {**own, "folder": str(folder), "steps": steps}))
    for errors in run_ranks(2, with_faults, trees, seconds=800):
        assert errors == [None] * len(trees), errors
    for name in layouts:
        found = records(tmp_path / policy / name)
        assert [one["kind"] for one in found] == ["not finite", "spike"], name
        assert sum(len(own["keys"]) for own in found[0]["ranks"]) == 16
        end = f"checkpoints/step-{ends[policy]:08}"
        equal_numbers(tmp_path / policy / name / end, tmp_path / "without" / name / "checkpoints/step-00000013")


def test_a_roll_back_of_adapters(solo: Mesh, tree: dict[str, Any], tmp_path: Path) -> None:
    run(config_of(changed(tree, {"folder": str(tmp_path / "base"), "steps": 4})), solo)
    own = {"init_from": str(tmp_path / "base/checkpoints/step-00000004/model"), "lora": {"rank": 4}, "steps": 6}
    with planted({64: math.nan}):
        run(config_of(changed(tree, {**own, "folder": str(tmp_path / "back"), "anomalies.policy": "roll_back"})), solo)
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / LEFT_OUT).write_text("[64]")
    run(config_of(changed(tree, {**own, "folder": str(tmp_path / "without")})), solo)
    ends = [tmp_path / name / "checkpoints/step-00000006" for name in ("back", "without")]
    equal_numbers(*ends)
    assert (name := same(*(read_adapters(end / ADAPTER) for end in ends))) is None, name
