"""Proposals are what the trainer takes, fit, and come in order; what the command prints and writes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from m2_ds.cli import run
from m2_ds.config import RunConfig, load_config
from m2_ds.plan.cluster import PRESETS, load_cluster
from m2_ds.plan.command import plan
from m2_ds.plan.layout import Candidate, Load
from m2_ds.plan.report import basis, text, why
from m2_ds.plan.search import TIE, Planner

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def planner(model: dict[str, Any], cluster: str = "h100", nodes: int = 1, **more: Any) -> Planner:
    base = {
        "folder": "runs/x", "steps": 1000, "global_batch": 4096, "tokenizer": "unused", "model": model,
        "data": {"sources": [{"path": "unused"}]}, "engine": {"precision": "bf16"}, **more,
    }  # fmt: skip
    config = RunConfig.model_validate(base)
    return Planner(base, config, load_cluster(cluster).with_size(nodes, None), Load.of(config))


def test_proposals_fit_are_taken_and_come_in_order() -> None:
    found = planner({"preset": "1b"}, nodes=2).search(4096, 1024)
    assert len(found.fitting) > 3 and found.looked_at > 200
    times = [p.time.total for p in found.fitting]
    tied = [t for t in times if t <= min(times) * (1 + TIE)]
    assert times[: len(tied)] == tied and times[len(tied) :] == sorted(times[len(tied) :])
    for p in found.fitting:
        assert p.fits and p.candidate.ranks == 16
        assert p.candidate.contrastive_batch >= 1024
        c = p.candidate
        assert c.data * c.accumulation * c.micro_batch == 4096
    assert len({(p.candidate.tensor, p.candidate.pipeline, p.candidate.zero) for p in found.fitting}) == len(times)
    assert all(not p.fits for p in found.too_large)


def test_what_the_trainer_refuses_is_never_proposed() -> None:
    """A contrast group has to lie on one node here, and a stage count of the recipe's own is given up."""
    room = planner({"preset": "0.4b"}, nodes=2, parallel={"pipeline_parallel_size": 2, "pipeline_layers": [8, 4]})
    found = room.search(4096, 4096)
    layouts = [p.candidate for p in found.fitting]
    assert not [c for c in layouts if c.stage != 1 and c.pipeline > 1]
    assert not [c for c in layouts if c.stage == 0 and c.tensor > 1]
    for c in layouts:
        room.check(c)
        split = room.recipe(c).parallel.pipeline_layers
        assert split == ([8, 4] if c.pipeline == 2 else None)
    heads_of_three = planner({"preset": "tiny"}).search(4096, 4096)
    assert {p.candidate.tensor for p in heads_of_three.fitting} == {1}


def test_a_refusal_of_the_engine_is_told_and_left_out(tmp_path: Path) -> None:
    room = planner({"preset": "0.4b"})
    candidate = room.search(4096, 4096).fitting[0].candidate
    with pytest.raises(ValueError, match="pipelines"):
        room.check(Candidate(**{**vars(candidate), "pipeline": 2, "data": 4, "group": 4, "zero": "zero2"}))
    with pytest.raises(ValueError, match="does not divide"):
        room.check(Candidate(**{**vars(candidate), "group": 3}))


def test_a_model_that_does_not_fit_says_what_it_lacks() -> None:
    room = planner({"preset": "10b"})
    room.cluster = room.cluster.model_copy(update={"memory_gb": 9.0, "host": None})
    found = room.search(4096, 4096)
    assert not found.fitting
    told = text(found, room, None)
    assert re.match(r"\d+\.\d\d billion parameters", told)
    assert "Nothing fits" in told and "does not fit" in told and "GB of 5.00" in told


def test_offload_is_proposed_where_nothing_else_fits() -> None:
    room = planner({"preset": "10b"})
    room.cluster = room.cluster.model_copy(update={"nodes": 1, "ranks_per_node": 1})
    found = room.search(512, 512)
    assert found.fitting and all(p.candidate.offload != "none" for p in found.fitting)


def test_the_report_says_why_and_what_is_extrapolated() -> None:
    room = planner({"preset": "1b"}, nodes=2)
    found = room.search(4096, 4096)
    told = text(found, room, 1e9)
    assert re.match(r"7\d\d\.\d\d million parameters", told)
    assert "Best: " in told and "gradients" in told and "activations" in told
    assert any("slower" in line or "as fast" in line for line in why(found))
    assert any(line.startswith("extrapolated: every second") for line in basis(room))
    assert [line for line in basis(room) if line.startswith("assumed: ")]
    for image_size, patches in ((64, 0), (224, 28 * 28)):
        measured = planner({"preset": "tiny", "hidden_size": 256, "num_heads": 4, "image_size": image_size})
        measured.cluster = measured.cluster.model_copy(update={"basis": "measured"})
        lines = [line for line in basis(measured) if line.startswith("extrapolated: attention")]
        told = f"extrapolated: attention over {patches + 1} tokens as fast as over the measured 197"
        assert lines == [told] * (patches > 0)


def test_a_cluster_of_256_is_looked_through() -> None:
    found = planner({"preset": "10b"}, nodes=32).search(131072, 32768, wanted=3)
    assert found.looked_at > 1000 and found.fitting[0].candidate.ranks == 256


def test_the_command_writes_a_recipe_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, told = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    words = ["--model", "1b", "--cluster", "a100-80", "--nodes", "4", "--global-batch", "32768", "--pairs", "1e9"]
    run(plan, "m2 plan", [*words, "--top", "3", "--emit", str(recipe), "--json", str(told)])
    out = capsys.readouterr().out
    assert f"deepspeed --hostfile hosts --module m2_ds.train --config {recipe}" in out
    config = load_config(recipe)
    found = json.loads(told.read_text())
    best = found["layouts"][0]
    assert config.parallel.tensor_parallel_size == best["candidate"]["tensor"]
    assert (config.micro_batch, config.steps) == (best["candidate"]["micro_batch"], 30518)
    assert config.engine.precision == "bf16" and config.optim.weight_decay == 0.2  # of the preset's recipe
    assert best["days"] == pytest.approx(config.steps * best["step_s"] / 86400)
    assert sum(best["seconds"].values()) == pytest.approx(best["step_s"])


def test_a_recipe_is_predicted_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load((ROOT / "ds_configs/recipes/10b.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**tree, "global_batch": 4096}))
    run(plan, "m2 plan", ["--recipe", str(path), "--cluster", "h100", "--as-it-is"])
    assert "tp 2, pp 1, dp 4, zero1, g 4, k 16 x 64, recompute full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "1b"], "--cluster: name one"),
        (["--model", "1b", "--cluster", "h300"], "there are a100-80, h100, h200"),
        (["--cluster", "h100"], "--model PRESET or --recipe FILE"),
        (["--model", "2b", "--cluster", "h100"], "there are 0.4b, 1b, 10b"),
        (["--model", "1b", "--cluster", "h100", "--pairs", "-1"], "positive"),
        (["--model", "1b", "--cluster", "h100", "--contrastive-batch", "10000000"], "at most the global batch"),
        (["--model", "1b", "--cluster", "h100", "--nodes", "32", "--global-batch", "7"], "divides over no layout"),
        (["--model", "1b", "--cluster", "h100", "--caption-tokens", "99"], "max_text_length"),
        (["--recipe", "ds_configs/recipes/emoji.yaml", "--cluster", "h100"], "optim.kind is muon"),
    ],
)
def test_what_cannot_be_planned_is_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(plan, "m2 plan", words)
    assert ended.value.code == 2 and told in capsys.readouterr().err


MASKED = {"cmlm": {"weight": 1.0}, "cmim": {"weight": 1.0, "choose": "random"}}


def test_masked_objectives_take_more_of_everything() -> None:
    plain, masked = planner({"preset": "1b"}), planner({"preset": "1b"}, loss=MASKED)
    c = Candidate(2, 2, 2, "zero1", 2, 64, 32, "full")
    less, more = plain.predict(c), masked.predict(c)
    for a, b in zip(less.memory, more.memory):
        assert b.peak > a.peak
    for a, b in zip(less.traffic, more.traffic):
        assert b.sent["tensor parallel"] > a.sent["tensor parallel"] and b.sent["pipeline"] > a.sent["pipeline"]
    own = [name for name in more.time.parts if name.startswith("masked ")]
    assert own == ["masked forward", "masked recomputation", "masked backward"]
    assert not [name for name in less.time.parts if "masked" in name]
    assert more.time.parts["second forward"] == less.time.parts["second forward"]  # which leaves them out


@pytest.mark.parametrize("choose", ["random", "attentive"])
def test_layouts_with_masked_objectives_are_those_that_the_trainer_takes(choose: str) -> None:
    room = planner({"preset": "1b"}, loss={**MASKED, "cmim": {"weight": 1.0, "choose": choose}})
    made = list(room.candidates(4096, 4096))
    assert {c.pipeline > 1 for c in made} == ({False, True} if choose == "random" else {False})
    assert {c.tensor > 1 for c in made} == {False, True} and not [c for c in made if c.sequence]
    found = room.search(4096, 4096)
    assert found.fitting and not found.refused
    for p in found.fitting:
        room.check(p.candidate)
    told = text(found, room, None)
    assert "masked backward" in told


def test_a_visual_tokenizer_is_not_counted_and_that_is_told() -> None:
    codes = {"cmim": {"weight": 1.0, "targets": "codes", "visual_tokenizer": "mine:load"}}
    assert [line for line in basis(planner({"preset": "tiny"}, loss=codes)) if "visual tokenizer" in line]
    assert not [line for line in basis(planner({"preset": "tiny"}, loss=MASKED)) if "visual tokenizer" in line]


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.yaml")))
def test_presets_load(preset: str) -> None:
    cluster = load_cluster(preset)
    assert cluster.name == preset and cluster.basis == "data sheet" and cluster.notes
    assert cluster.with_size(4, None).ranks == 32
