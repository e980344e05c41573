"""What has to hold under every ZeRO stage beside equal curves: bf16, the clamp, unreached weights, evaluation."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import m2_ds
from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.evaluation.run import run_evaluations
from m2_ds.loss.contrastive import ContrastiveLoss
from m2_ds.loss.exchange import Pool
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import init_weights
from m2_ds.parallel.mesh import Mesh
from tests.engine.jobs import attempt, changed, config_of, curve, log_lines, same, weights
from tests.support.ranks import run_ranks

STAGES = ("zero0", "zero1", "zero2", "zero3")
CEILING = 9.0  # exp(logit_scale) starts at 14.3


def job(mesh: Mesh, trees: list[dict[str, Any]]) -> list[str | None]:
    """Trains each; the loss function complains about features that are not fp32."""
    from m2_ds.engine import step

    original = step.contrastive_loss

    def watched(levels: Any, pool: Pool, *arguments: Any) -> ContrastiveLoss:
        loss = original(levels, pool, *arguments)
        assert {x.dtype for x in (*pool.own, *pool.everyone)} == {torch.float32}
        assert loss.value.dtype == loss.by_pair.dtype == torch.float32
        assert {g.dtype for level in loss.gradients for g in level.features} == {torch.float32}
        return loss

    step.contrastive_loss = watched
    return [attempt(mesh, tree) for tree in trees]


@pytest.fixture(scope="module")
def evaluation(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    classes = tmp_path_factory.mktemp("classes") / "shapes.json"
    names = {"circle": "圆形", "square": "正方形", "bar": "长条", "cross": "十字"}
    classes.write_text(json.dumps({key: {"en": [key], "zh": [zh]} for key, zh in names.items()}), encoding="utf-8")
    common = {"dataset": str(shapes), "splits": ["test"]}
    tasks = [{"kind": "retrieval", **common}, {"kind": "zeroshot", "classes": str(classes), **common}]
    return {"tasks": tasks, "every": 3, "batch_size": 5}  # 26 pictures: 13 a rank, in batches of 5, 5 and 3


@pytest.fixture(scope="module")
def folder(
    recipe: dict[str, Any],
    deepspeed_files: dict[str, Path],
    evaluation: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    trees = []

    def add(name: str, stage: str, **changes: Any) -> None:
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        own = {"folder": str(folder / name), "engine.deepspeed": str(deepspeed_files[stage])}
        trees.append(changed(recipe, {**own, **changes}))

    add("fp32", "zero1", optim__max_logit_scale=CEILING)
    for stage in (*STAGES[:3], "zero2_offload", STAGES[3]):  # ZeRO-3 last: it replaces torch's linear layer for good
        add(f"bf16-{stage}", stage, engine__precision="bf16", optim__max_logit_scale=CEILING)
    for stage in STAGES:
        add(f"vl-{stage}", stage, steps=4, loss__unimodal_weight=0.0, optim__max_logit_scale=CEILING)
        add(f"unimodal-{stage}", stage, steps=4, loss__vl_weight=0.0)
    add("quiet", "zero3", steps=6)
    add("evaluated", "zero3", steps=6, evaluation=evaluation)
    for errors in run_ranks(2, job, trees, seconds=250):
        assert errors == [None] * len(trees), "\n".join(filter(None, errors))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [*STAGES, "zero2_offload"])
def test_bf16_trains_at_every_stage(folder: Path, stage: str) -> None:
    found, fp32 = folder / f"bf16-{stage}", folder / "fp32"
    assert curve(found)[-1] < curve(found)[0] - 0.5
    # bf16 keeps 8 bits: 0.4% a number. A first step at half its size would be off by several times that.
    torch.testing.assert_close(curve(found), curve(fp32), rtol=0.02, atol=0)
    torch.testing.assert_close(curve(found, "grad_norm")[:2], curve(fp32, "grad_norm")[:2], rtol=0.05, atol=0)
    # Checkpoints hold the fp32 masters, which bf16 could not.
    trained = weights(found, 8)["itc_vl_text_proj.fc.weight"]
    assert trained.dtype == torch.float32 and not torch.equal(trained, trained.bfloat16().float())


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["fp32", *(f"{kind}-{stage}" for kind in ("bf16", "vl") for stage in STAGES)])
def test_logit_scales_are_clamped_after_every_step(folder: Path, name: str) -> None:
    fields = ["logit_scale/vl"] if name.startswith("vl") else ["logit_scale/unimodal", "logit_scale/vl"]
    for field in fields:
        scale = curve(folder / name, field)
        assert scale[0] == pytest.approx(1 / 0.07, rel=0.01)
        # The loss sees the bf16 copy of the clamped master: near log 9, numbers of 8 bits lie 1/64 apart.
        assert (scale[1:] <= CEILING * (1 + 1 / 128 if name.startswith("bf16") else 1.000001)).all()
        assert scale[1] > 0.97 * CEILING
    step = log_lines(folder / name)[-1]["step"]
    final = weights(folder / name, step)["logit_vl_scale"]
    assert final <= math.log(CEILING) + 1e-6


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("vl", ("logit_scale", "itc_text_proj.", "itc_image_proj.")),
        ("unimodal", ("logit_vl_scale", "itc_vl_text_proj.", "itc_vl_image_proj.", "backbone_vl.")),
    ],
)
def test_weights_that_the_loss_does_not_reach_stay_as_they_are(
    folder: Path, recipe: dict[str, Any], kind: str, left: tuple[str, ...]
) -> None:
    config = config_of(recipe).model
    model = M2Encoder(config)
    init_weights(model, config, recipe["seed"])
    first = dict(model.state_dict())
    found = {stage: weights(folder / f"{kind}-{stage}", 4) for stage in STAGES}
    for stage in STAGES:
        kept = {name for name in first if torch.equal(first[name], found[stage][name])}
        for name in first:
            if name.startswith(left):
                assert name in kept, f"{stage}: {name} was changed"
        # What the other level needs was trained, but for what rules and the released network leave out.
        reached = {"itc_vl_text_proj.fc.weight", "logit_vl_scale"} if kind == "vl" else {"itc_text_proj.fc.weight"}
        assert not reached & kept
    for stage in STAGES[1:]:
        for name in first:
            torch.testing.assert_close(found[stage][name], found["zero0"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_evaluation_on_two_ranks_under_zero3_gives_the_numbers_of_one_process(
    folder: Path, evaluation: dict[str, Any]
) -> None:
    model, processor = m2_ds.load(folder / "evaluated")
    wanted = run_evaluations(model, processor, EvaluationConfig.model_validate(evaluation))
    found = json.loads((folder / "evaluated/evaluation/step-00000006.json").read_text())
    assert found["step"] == 6 and found["metrics"] == pytest.approx(wanted)
    assert len(wanted) > 10 and any("zeroshot" in name for name in wanted)
    assert (folder / "evaluated/evaluation/step-00000003.json").exists()


@pytest.mark.distributed
def test_evaluating_does_not_disturb_training(folder: Path) -> None:
    assert torch.equal(curve(folder / "evaluated"), curve(folder / "quiet"))
    assert same(weights(folder / "evaluated", 6), weights(folder / "quiet", 6)) is None
