"""Checkpoints that are damaged, half written, refused or removed; what the run does then."""

import contextlib
import logging
import math
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_ds.convert.run_folder import checkpoint_steps, newest_good
from m2_ds.data.text import load_tokenizer
from m2_ds.engine import checkpoint, resume
from m2_ds.engine.environment import claim
from m2_ds.engine.step import ContrastiveStep
from m2_ds.parallel.mesh import Mesh
from m2_ds.train import run
from tests.engine.jobs import changed, compare_checkpoints, config_of, curve, exact_part, log_lines, weights
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def tree(recipe: dict[str, Any]) -> dict[str, Any]:
    return changed(recipe, {"steps": 6, "checkpoint": {"every": 2, "keep": 9}})


@pytest.fixture(scope="module")
def whole(solo: Mesh, tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints after steps 2, 4, 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(config_of(changed(tree, {"folder": str(folder)})), solo)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def again(solo: Mesh, tree: dict[str, Any], copy: Path) -> Callable[..., None]:
    """Start the job again on the copy, with changed settings."""
    return lambda **changes: run(
        config_of(changed(tree, {"folder": str(copy), **{k.replace("__", "."): v for k, v in changes.items()}})), solo
    )


def ends_like(copy: Path, whole: Path) -> None:
    compare_checkpoints(copy / "checkpoints/step-00000006", whole / "checkpoints/step-00000006")
    assert exact_part(log_lines(copy)) == exact_part(log_lines(whole))


def state_file(checkpoint: Path) -> Path:
    return checkpoint / "optimizer/exp_avg_sq/model.safetensors"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_finished_run_is_left_as_it_is(copy: Path, again: Callable[..., None]) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*.safetensors")}
    again()
    assert {path: path.read_bytes() for path in copy.rglob("*.safetensors")} == before
    assert len(log_lines(copy)) == 6


def test_a_damaged_newest_is_passed_over_and_written_again(
    copy: Path, whole: Path, again: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    flip(state_file(copy / "checkpoints/step-00000006"))
    with caplog.at_level(logging.INFO):
        again()
    assert re.search("step-00000006 passed over: .*exp_avg_sq/model.safetensors is damaged", caplog.text)
    assert "going on after step 4 of 6" in caplog.text
    ends_like(copy, whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(copy: Path, again: Callable[..., None]) -> None:
    for step in (2, 4, 6):
        flip(state_file(copy / f"checkpoints/step-{step:08}"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"3 checkpoint\(s\) and none of them is whole.*init_from="):
        again()
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_pruning_keeps_the_newest_and_the_multiples(solo: Mesh, tree: dict[str, Any], tmp_path: Path) -> None:
    changes = {"folder": str(tmp_path), "steps": 8, "checkpoint": {"every": 1, "keep": 2, "keep_every": 3}}
    run(config_of(changed(tree, changes)), solo)
    assert sorted(checkpoint_steps(tmp_path / "checkpoints")) == [3, 6, 7, 8]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:08}" for step in (3, 6, 7, 8)
    ]


def test_pruning_never_takes_damaged_later_ones_for_the_newest(copy: Path, again: Callable[..., None]) -> None:
    for step in (4, 6):
        flip(state_file(copy / f"checkpoints/step-{step:08}"))
    again(steps=3, checkpoint={"every": 1, "keep": 1})
    assert sorted(checkpoint_steps(copy / "checkpoints")) == [3, 4, 6]
    found = newest_good(copy / "checkpoints")
    assert found is not None and found.name == "step-00000003"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 4}, "seed was 3, is now 4"),
        ({"model__num_layers": 3}, "model.num_layers was 2, is now 3"),
        ({"engine__precision": "bf16"}, "engine.precision was 'fp32', is now 'bf16'"),
        ({"optim__rules": []}, r"optim.rules.0.lr_scale was 0.5, is now None"),
        ({"loss__unimodal_weight": 0.0}, "loss.unimodal_weight was 0.5, is now 0.0"),
    ],
)
def test_other_settings_are_refused_with_a_remedy(
    copy: Path, again: Callable[..., None], changes: dict[str, Any], words: str
) -> None:
    before = (copy / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=f"{words}.*init_from=.*step-00000006/model"):
        again(**changes)
    assert (copy / "config.yaml").read_bytes() == before


def test_another_layout_is_told_and_goes_on(
    copy: Path,
    whole: Path,
    again: Callable[..., None],
    deepspeed_files: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.rmtree(copy / "checkpoints/step-00000006")
    with caplog.at_level(logging.INFO):
        again(engine__deepspeed=str(deepspeed_files["zero0"]))
    assert re.search("another layout: was 1 tensor x 1 data x 1 pipeline.* stage 1, is now .* stage 0", caplog.text)
    assert "going on with a change" not in caplog.text
    torch.testing.assert_close(curve(copy), curve(whole), rtol=1e-5, atol=0)


def test_other_contrast_groups_are_told(
    copy: Path, tree: dict[str, Any], solo: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    newest, config = copy / "checkpoints/step-00000006", config_of(changed(tree, {"folder": str(copy)}))
    now = {**resume.layout(solo, zero_stage=1), "contrast_groups": 2}
    assert resume.check(newest, config, load_tokenizer(tree["tokenizer"]), now) == 6
    assert "pairs were compared in 1 contrast group(s), are now in 2" in caplog.text


def test_a_checkpoint_of_another_version_is_refused_with_a_remedy(copy: Path, tree: dict[str, Any], solo: Mesh) -> None:
    newest, config = copy / "checkpoints/step-00000006", config_of(changed(tree, {"folder": str(copy)}))
    shutil.rmtree(newest / "optimizer")
    with pytest.raises(ValueError, match=r"holds no optimizer, so another version.*init_from=.*step-00000006/model"):
        resume.check(newest, config, load_tokenizer(tree["tokenizer"]), resume.layout(solo, zero_stage=1))


def test_another_tokenizer_is_refused_with_a_remedy(
    copy: Path, again: Callable[..., None], tree: dict[str, Any], tmp_path: Path
) -> None:
    other = load_tokenizer(tree["tokenizer"])
    other.truncation = "left"
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the tokenizer that .* Set tokenizer=.*step-00000006/model"):
        again(tokenizer=str(tmp_path / "other"))
    again(tokenizer=str(copy / "checkpoints/step-00000006/model"))


def test_settings_without_effect_on_the_numbers_may_change(
    copy: Path, whole: Path, again: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(copy / "checkpoints/step-00000006")
    with caplog.at_level(logging.WARNING):
        again(data__workers=1, data__prefetch=2, log__every=1, model__recompute="full", data__picture_cache_mb=10)
    assert "going on with a change" not in caplog.text
    assert exact_part(log_lines(copy)) == exact_part(log_lines(whole))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those of the runs that the test starts."""
    found: list[Any] = []

    class Watched(ContrastiveStep):
        def __init__(self, engine: Any, *arguments: Any) -> None:
            super().__init__(engine, *arguments)
            found.append(engine)

    monkeypatch.setattr("m2_ds.engine.trainer.ContrastiveStep", Watched)
    return found


def test_a_changed_learning_rate_is_told_and_used(
    copy: Path, whole: Path, again: Callable[..., None], caplog: pytest.LogCaptureFixture, engines: list[Any]
) -> None:
    shutil.rmtree(copy / "checkpoints/step-00000006")
    with caplog.at_level(logging.WARNING):
        again(optim__lr=1e-4, optim__betas=[0.8, 0.9], steps=8)
    for words in ("optim.lr was 0.002, is now 0.0001", "optim.betas.0 was 0.9, is now 0.8", "steps was 6, is now 8"):
        assert f"going on with a change: {words}" in caplog.text
    lr = curve(copy, "lr")
    assert len(lr) == 8 and torch.equal(lr[:4], curve(whole, "lr")[:4])
    expected = [1e-4 * (0.5 + 0.5 * math.cos(math.pi * (step - 2) / 6)) for step in range(4, 8)]
    torch.testing.assert_close(lr[4:], torch.tensor(expected, dtype=torch.float64))
    groups = engines[-1].optimizer.param_groups
    assert sorted({group["initial_lr"] for group in groups}) == [5e-5, 1e-4, 2e-4]
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}


def test_a_changed_momentum_of_muon_is_used(
    solo: Mesh, recipe: dict[str, Any], deepspeed_files: dict[str, Path], tmp_path: Path, engines: list[Any]
) -> None:
    settings = {"optim.kind": "muon", "engine.deepspeed": str(deepspeed_files["zero0"]), "steps": 3}
    tree = changed(recipe, {**settings, "folder": str(tmp_path), "optim.momentum": 0.9})
    run(config_of(tree), solo)
    run(config_of(changed(tree, {"steps": 4, "optim.momentum": 0.5})), solo)
    assert [{group["momentum"] for group in engine.optimizer.param_groups} for engine in engines] == [{0.9}, {0.5}]


def test_the_engine_stands_where_it_would_have(copy: Path, again: Callable[..., None], engines: list[Any]) -> None:
    shutil.rmtree(copy / "checkpoints"), (copy / "log.jsonl").unlink()
    again()
    shutil.rmtree(copy / "checkpoints/step-00000006")
    again()
    straight, resumed = engines
    for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps"):
        assert getattr(resumed, name) == getattr(straight, name), name
    assert straight.global_steps == 6
    mine, yours = resumed.lr_scheduler.state_dict(), straight.lr_scheduler.state_dict()
    assert mine == yours and resumed.get_lr() == straight.get_lr()
    steps = [{float(s["step"]) for s in engine.optimizer.optimizer.state.values()} for engine in engines]
    assert steps == [{6.0}, {6.0}]


# -- writing that fails ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond this many bytes: what a full disk looks like to every writer, C++ and Rust included."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Where TensorBoard's thread may write in the meantime, its file must fit.
@pytest.mark.parametrize(
    ("part", "limit"), [("_write", 20_000), ("_write_part", 20_000), ("write_config", 100), ("write_json", 100)]
)
def test_a_full_disk_stops_the_run_and_leaves_the_older_checkpoint(
    solo: Mesh,
    tree: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    limit: int,
) -> None:
    config = config_of(changed(tree, {"folder": str(tmp_path / "run"), "checkpoint.failures_allowed": 0}))
    original = getattr(checkpoint, part)

    def full(*arguments: Any, **options: Any) -> Any:
        with small_files(limit) if newest_good(tmp_path / "run/checkpoints") else contextlib.nullcontext():
            return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="step-00000004 could not be written.*space"):
        patch.setattr(checkpoint, part, full)
        run(config, solo)
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [2]
    run(config, solo)
    ends_like(tmp_path / "run", whole)
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def killed(mesh: Mesh, tree: dict[str, Any], part: str) -> None:
    """The job is killed in the middle of writing its second checkpoint."""
    original = getattr(checkpoint, part)

    def kill(*arguments: Any, **options: Any) -> Any:
        if checkpoint_steps(Path(tree["folder"]) / "checkpoints"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(checkpoint, part, kill)
    run(config_of(tree), mesh)


@pytest.mark.distributed
@pytest.mark.parametrize("part", ["_write_part", "write_config", "publish"])
def test_a_job_killed_while_it_writes_goes_on_from_the_older_checkpoint(
    solo: Mesh, tree: dict[str, Any], whole: Path, tmp_path: Path, part: str
) -> None:
    job = changed(tree, {"folder": str(tmp_path / "run")})
    with pytest.raises(RuntimeError, match="died with \\[-9\\]"):
        run_ranks(1, killed, job, part)
    folder = tmp_path / "run/checkpoints"
    assert checkpoint_steps(folder) == [2]
    assert [path.name for path in folder.glob(".*")] == [".step-00000004.part"]
    run(config_of(job), solo)
    ends_like(tmp_path / "run", whole)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08}" for step in (2, 4, 6)]


def test_what_killed_jobs_left_behind_is_removed(copy: Path, again: Callable[..., None]) -> None:
    left = [copy / "checkpoints" / name for name in (".step-00000005.part", ".step-00000003.removed")]
    for folder in left:
        shutil.copytree(copy / "checkpoints/step-00000002", folder)
    again()
    assert not any(folder.exists() for folder in left)
    assert sorted(checkpoint_steps(copy / "checkpoints")) == [2, 4, 6]


def test_a_second_job_on_the_folder_is_refused(solo: Mesh, copy: Path, again: Callable[..., None]) -> None:
    with claim(copy, solo), pytest.raises(ValueError, match="another job is writing to"):
        again()
    again()


def test_a_folder_that_cannot_be_made_is_told(solo: Mesh, tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder: cannot write to"):
        run(config_of(changed(tree, {"folder": str(tmp_path / "file/run")})), solo)


# -- numbers that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("every", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(
    solo: Mesh,
    tree: dict[str, Any],
    tmp_path: Path,
    deepspeed_files: dict[str, Path],
    stage: str,
    precision: str,
    every: int,
) -> None:
    changes = {
        "folder": str(tmp_path),
        "steps": 9,
        "checkpoint": {"every": 1, "keep": 99},
        "log.every": every,
        "engine.deepspeed": str(deepspeed_files[stage]),
        "engine.precision": precision,
        "optim.lr": 1e30,
    }
    with pytest.raises(FloatingPointError, match=r"not finite.* Lower optim\.lr"):
        run(config_of(changed(tree, changes)), solo)
    for step in checkpoint_steps(tmp_path / "checkpoints"):
        assert all(weight.isfinite().all() for weight in weights(tmp_path, step).values())
    json_text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in json_text and "Infinity" not in json_text


@pytest.mark.parametrize("asynchronous", [False, True])
def test_weights_that_are_not_finite_are_not_written(
    solo: Mesh, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    original = ContrastiveStep.__call__

    def spoil(self: ContrastiveStep, *arguments: Any) -> Any:
        result = original(self, *arguments)
        with torch.no_grad():
            engine = self.passes.engine
            masters = max(engine.optimizer.single_partition_of_fp32_groups, key=torch.numel)
            for held in (engine.module.itc_vl_text_proj.fc.weight, masters):
                held.view(-1)[37] = float("inf")
        return result

    monkeypatch.setattr(ContrastiveStep, "__call__", spoil)
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1: no checkpoint"):
        block = {"every": 1, "asynchronous": asynchronous}
        run(
            config_of(
                changed(
                    tree, {"folder": str(tmp_path), "steps": 1, "optim.schedule.warmup_steps": 0, "checkpoint": block}
                )
            ),
            solo,
        )
    assert not (tmp_path / "checkpoints").exists()
