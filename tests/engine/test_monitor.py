"""What a run writes about itself: log.jsonl, TensorBoard, configuration and environment; pairs that were skipped."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from m2_ds.config import load_config
from m2_ds.data.stream import build_loader
from m2_ds.data.text import load_tokenizer
from m2_ds.engine.monitor import _forget_after
from m2_ds.engine.passes import PHASES
from m2_ds.parallel.mesh import Mesh
from m2_ds.train import run
from tests.engine.jobs import Interrupted, changed, config_of, curve, log_lines, stopped_after

FIELDS = {
    *("step", "samples", "time", "loss", "loss/unimodal", "loss/vl", "loss/en", "loss/zh", "lr", "grad_norm"),
    *("logit_scale/unimodal", "logit_scale/vl", "samples_per_s", "step_s", "data_wait_s", "data_wait_share"),
    *(
        "tflops",
        "mfu",
        "memory_gb",
        "skipped",
        "other_language",
        "epochs/shapes",
        "contrastive_batch",
        "repeated_share",
        "communication_share",
    ),
    *(f"seconds/{phase}" for phase in PHASES),
}


@pytest.fixture(scope="module")
def folder(solo: Mesh, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps with a checkpoint after step 5, logged every 4, that knows its device's peak."""
    folder = tmp_path_factory.mktemp("monitor") / "run"
    changes = {"folder": str(folder), "steps": 10, "checkpoint.every": 5, "log": {"every": 4, "peak_tflops": 2.0}}
    run(config_of(changed(recipe, changes)), solo)
    return folder


def test_a_log_line_has_the_documented_fields(folder: Path) -> None:
    lines = log_lines(folder)
    # Every 4 steps, at the checkpoints and at the end: a line covers the steps since the one before.
    assert [line["step"] for line in lines] == [4, 5, 8, 10]
    for line in lines:
        assert line.keys() == FIELDS
        assert 0 < sum(line[f"seconds/{phase}"] for phase in PHASES) < line["step_s"]
        assert line["seconds/recompute"] == 0 and line["contrastive_batch"] == 16
        assert line["samples"] == 16 * line["step"]
        assert all(isinstance(line[name], int | float) for name in FIELDS - {"skipped"})
        assert line["loss"] == pytest.approx(0.5 * line["loss/unimodal"] + line["loss/vl"], rel=1e-6)
        languages, levels = line["loss/en"] + line["loss/zh"], line["loss/unimodal"] + line["loss/vl"]
        assert languages == pytest.approx(levels, rel=1e-6)
        assert line["samples_per_s"] * line["step_s"] == pytest.approx(16)
        assert line["mfu"] == pytest.approx(line["tflops"] / 2.0)
        assert 0 <= line["data_wait_share"] <= 1
        assert line["skipped"] == {}


def test_lines_are_means_over_their_steps(solo: Mesh, recipe: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    run(config_of(changed(recipe, {"folder": str(tmp_path), "steps": 10, "log.every": 1})), solo)
    for name in ("loss", "loss/zh", "grad_norm"):
        each = curve(tmp_path, name)
        expected = [each[0:4].mean(), each[4:5].mean(), each[5:8].mean(), each[8:10].mean()]
        assert curve(folder, name).tolist() == pytest.approx([float(x) for x in expected], rel=1e-5)


def test_the_curves_are_in_tensorboard(folder: Path) -> None:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert FIELDS - {"step", "samples", "time", "skipped"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [4, 5, 8, 10]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(curve(folder).tolist(), rel=1e-6)


def test_tensorboard_shows_no_step_twice_after_a_restart(solo: Mesh, recipe: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(changed(recipe, {"folder": str(tmp_path), "checkpoint.every": 3}))
    with stopped_after(5), pytest.raises(Interrupted):
        run(config, solo)
    run(config, solo)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


def test_the_run_folder_says_what_ran(folder: Path) -> None:
    config = load_config(folder / "config.yaml")
    assert config.steps == 10 and config.model.hidden_size == 32
    assert yaml.safe_load((folder / "checkpoints/step-00000010/config.yaml").read_text())["steps"] == 10
    environment = json.loads((folder / "environment.json").read_text())
    assert {"m2_ds", "commit", "command", "python", "packages", "device", "world_size"} <= environment.keys()
    assert environment["world_size"] == 1 and environment["packages"]["torch"]


def test_skipped_pairs_are_counted_by_reason(
    solo: Mesh, recipe: dict[str, Any], broken_shapes: Path, tmp_path: Path
) -> None:
    config = config_of(
        changed(recipe, {"folder": str(tmp_path), "data.sources": [{"path": str(broken_shapes)}], "log.every": 4})
    )
    run(config, solo)
    loader = build_loader(
        config.data, load_tokenizer(config.tokenizer), global_batch=16, micro_batch=16, seed=config.seed
    )
    wanted: Counter[str] = Counter()
    for _, batch in zip(range(8), loader):
        wanted.update(batch.skipped)
    assert sum(wanted.values()) >= 8
    assert log_lines(tmp_path)[-1]["skipped"] == dict(wanted)


def test_a_pair_that_cannot_be_replaced_stops_the_run(
    solo: Mesh, recipe: dict[str, Any], broken_shapes: Path, tmp_path: Path
) -> None:
    changes = {"folder": str(tmp_path), "data.sources": [{"path": str(broken_shapes)}], "steps": 60}
    tree = changed(recipe, {**changes, "data.max_attempts": 1})
    with pytest.raises(ValueError, match=r"no usable pair in 2 tries"):
        run(config_of(tree), solo)


def test_lines_past_a_step_and_torn_lines_are_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    kept = [{"step": 2, "skipped": {"broken": 1}}, {"step": 4, "skipped": {"broken": 3}}]
    torn = ['{"step": 5, "los', '"text"', "[1]", "null", '{"loss": 1}', '{"step": "x"}']
    text = "\n".join([*map(json.dumps, kept), *torn, json.dumps({"step": 6, "skipped": {"broken": 9}})])
    path.write_bytes(text.encode() + "\n\u4e2d".encode()[:-1])
    with caplog.at_level(logging.WARNING):
        assert _forget_after(path, 4) == kept[-1]
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept
    assert caplog.text.count("was dropped") == len(torn) + 1
    assert _forget_after(tmp_path / "other.jsonl", 4) == {}


def test_wandb_without_the_package_is_refused_at_the_start(
    solo: Mesh, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="log.wandb_project is set, but wandb is not installed: pip install wandb"):
        run(config_of(changed(recipe, {"folder": str(tmp_path / "run"), "log.wandb_project": "x"})), solo)
    assert not (tmp_path / "run").exists()


def test_files_that_a_run_will_need_are_looked_at_before_it_starts(
    solo: Mesh, recipe: dict[str, Any], shapes: Path, tmp_path: Path
) -> None:
    task = {"kind": "retrieval", "dataset": str(shapes), "splits": ["nothing"]}
    for changes, words in [
        ({"evaluation.tasks": [task]}, "nothing"),
        ({"data.sources": [{"path": str(tmp_path / "no data")}]}, "no data"),
        ({"data.sources": [{"path": str(shapes), "split": "nothing"}]}, "nothing"),
        ({"tokenizer": str(tmp_path / "no tokenizer")}, "no tokenizer"),
        ({"model": {"preset": "test", "vocab_size": 100}}, "set model.vocab_size=330"),
        ({"init_from": str(tmp_path / "no weights")}, "no weights"),
        ({"engine.deepspeed": str(tmp_path / "no.json")}, r"engine.deepspeed: .*no.json cannot be read"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(config_of(changed(recipe, {"folder": str(tmp_path / "run"), **changes})), solo)
    assert not (tmp_path / "run/log.jsonl").exists()


def test_an_evaluation_that_a_job_did_not_come_to_is_made_up_for(
    solo: Mesh, recipe: dict[str, Any], shapes: Path, tmp_path: Path
) -> None:
    tasks = [{"kind": "retrieval", "dataset": str(shapes), "splits": ["test"]}]
    config = config_of(changed(recipe, {"folder": str(tmp_path), "evaluation.tasks": tasks}))
    run(config, solo)
    file = tmp_path / "evaluation/step-00000008.json"
    first = file.read_bytes()
    file.unlink()
    run(config, solo)
    assert file.read_bytes() == first
