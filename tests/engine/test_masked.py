"""Masked objectives beside the contrastive one: gradients of every layout against one process, a caption at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from m2_ds.config import RunConfig
from m2_ds.engine.masked import checked_codes, load_visual_tokenizer
from m2_ds.loss.config import LossConfig
from m2_ds.model.encoder import M2Encoder
from tests.engine.cases import PAIRS, Case, check, run_cases
from tests.engine.jobs import changed, config_of, curve, log_lines, train_all
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(400)
BOTH = (("loss.cmlm.weight", 0.7), ("loss.cmim.weight", 1.3))
RANDOM = (*BOTH, ("loss.cmim.choose", "random"))
ATTENTIVE = (*BOTH, ("model.patch_drop", 0.0))
WORDS = (("loss.cmlm.weight", 2.0),)
PATCHES = (("loss.cmim.weight", 2.0), ("loss.cmim.choose", "random"))
CODES = (
    *RANDOM,
    ("loss.cmim.targets", "codes"),
    ("loss.cmim.visual_tokenizer", "tests.engine.cases:mean_colour_codes"),
    ("loss.cmim.codes", 16),
)


@pytest.mark.distributed
def test_gradients_are_those_of_one_giant_batch(recipe: dict[str, Any], deepspeed_files: dict[str, Path]) -> None:
    cases = [
        Case("zero0", 1, 2, changes=RANDOM),
        Case("zero1", 2, 2, changes=(*ATTENTIVE, ("model.recompute", "full"))),
        Case("zero2", 1, 3, kept=2, changes=CODES),
        Case("zero3", 2, 2, changes=ATTENTIVE),
        Case("zero1", 2, 2, partial=1, changes=RANDOM),
        Case("zero1", 2, 2, partial=0, changes=PATCHES),
    ]
    for reports in run_ranks(2, run_cases, recipe, deepspeed_files, cases, seconds=200):
        check(reports)


@pytest.mark.distributed
def test_they_are_on_tensor_parallel_ranks_and_in_pipelines(
    recipe: dict[str, Any], deepspeed_files: dict[str, Path]
) -> None:
    uneven = ("model.vocab_size", 601)  # the last rank's share of the vocabulary is filled up
    cases = [
        Case("zero1", 1, 1, tensor=2, changes=(*ATTENTIVE, uneven)),
        Case("zero3", 1, 2, tensor=2, changes=(*RANDOM, uneven)),
        Case("zero1", 1, 2, pipeline=2, changes=RANDOM),
        Case("zero1", 1, 3, pipeline=2, partial=1, changes=WORDS),
        Case("zero1", 1, 2, pipeline=2, changes=CODES),
    ]
    for reports in run_ranks(2, run_cases, recipe, deepspeed_files, cases, seconds=200):
        check(reports)


@pytest.mark.slow
@pytest.mark.distributed
def test_they_are_on_all_axes_together(recipe: dict[str, Any], deepspeed_files: dict[str, Path]) -> None:
    cases = [Case("zero1", 2, 2, tensor=2, pipeline=2, changes=RANDOM)]
    for reports in run_ranks(8, run_cases, recipe, deepspeed_files, cases, seconds=300):
        check(reports)


@pytest.fixture(scope="module")
def runs(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole runs on two ranks: no masked objectives, weights of 0, both objectives, and these in a pipeline."""
    folder = tmp_path_factory.mktemp("masked")
    plain = {"model.patch_drop": 0.0}
    both = {**plain, "loss.cmlm": {"weight": 1.0, "warmup_steps": 4}, "loss.cmim": {"weight": 0.5, "choose": "random"}}
    trees = {
        "none": plain,
        "zero": {**plain, "loss.cmlm": {"weight": 0.0}, "loss.cmim": {"weight": 0.0}},
        "both": both,
        "pipeline": {**both, "parallel.pipeline_parallel_size": 2, "micro_batch": 8},
    }
    made = [changed(recipe, {**own, "folder": str(folder / name)}) for name, own in trees.items()]
    for errors in run_ranks(2, train_all, made, seconds=200):
        assert errors == [None] * len(made), errors
    return {name: folder / name for name in trees}


@pytest.mark.distributed
def test_weight_0_is_the_run_without_them(runs: dict[str, Path]) -> None:
    assert torch.equal(curve(runs["zero"]), curve(runs["none"]))
    assert torch.equal(curve(runs["zero"], "grad_norm"), curve(runs["none"], "grad_norm"))
    assert not any("cm" in name for name in log_lines(runs["zero"])[-1])


@pytest.mark.distributed
def test_the_log_tells_of_them_alike_in_any_layout(runs: dict[str, Path]) -> None:
    for name in ("loss", "loss/cmlm", "loss/cmim", "cmim_error", "cmlm_accuracy/en", "cmlm_accuracy/zh", "grad_norm"):
        torch.testing.assert_close(curve(runs["both"], name), curve(runs["pipeline"], name), rtol=1e-4, atol=1e-6)
    lines = log_lines(runs["both"])
    for step, line in enumerate(lines):
        weight = min(1.0, (step + 1) / 4)
        contrastive = 0.5 * line["loss/unimodal"] + line["loss/vl"]
        assert line["loss"] == pytest.approx(contrastive + weight * line["loss/cmlm"] + 0.5 * line["loss/cmim"])
    assert lines[-1]["loss/cmlm"] < lines[0]["loss/cmlm"] - 0.3
    assert 0 <= lines[-1]["cmlm_accuracy/en"] <= 1


def test_weight_0_builds_nothing(recipe: dict[str, Any]) -> None:
    def names(tree: dict[str, Any]) -> set[str]:
        return set(M2Encoder(config_of(tree).model).state_dict())

    without, both = names(recipe), names(changed(recipe, dict(RANDOM)))
    assert names(changed(recipe, {"loss.cmlm.weight": 0, "loss.cmim.share": 0.3})) == without
    assert {name.split(".")[0] for name in both - without} == {"masked_text_head", "masked_image_head"}


def test_weights_follow_their_schedule() -> None:
    loss = LossConfig.model_validate({"cmlm": {"weight": 2.0, "warmup_steps": 4, "final_weight": 0.5}})
    assert [loss.cmlm.weight_at(step, 11) for step in (0, 3, 4, 7, 10)] == [0.5, 2.0, 2.0, 1.25, 0.5]
    assert loss.cmim.weight_at(3, 11) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.cmim.weight": 1, "parallel.pipeline_parallel_size": 2, "model.patch_drop": 0}, "choose: random"),
        ({"loss.cmim.weight": 1}, "patch_drop"),
        ({"loss.cmim.weight": 1, "loss.unimodal_weight": 0}, "unimodal_weight is 0"),
        ({"loss.cmim.targets": "codes"}, "visual_tokenizer"),
        ({"loss.cmlm.warmup_steps": 5}, "weight is 0"),
        (
            {"loss.cmlm.weight": 1, "parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}},
            "set it to false",
        ),
        ({"loss.cmlm.weight": 1, "lora": {}, "init_from": "x"}, "lora adapts"),
    ],
)
def test_what_cannot_be_had_is_refused(recipe: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(changed(recipe, changes))


def test_a_visual_tokenizer_is_checked() -> None:
    device = torch.device("cpu")
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32)).to(torch.uint8)
    codes = load_visual_tokenizer("tests.engine.cases:mean_colour_codes", device)(images)
    assert checked_codes(codes, PAIRS, 16, 16) is codes
    with pytest.raises(ValueError, match="package.module:function"):
        load_visual_tokenizer("tests.engine.cases:nothing_of_the_kind", device)
    with pytest.raises(ValueError, match=r"int64 \[3, 9\]"):
        checked_codes(codes, PAIRS, 9, 16)
    with pytest.raises(ValueError, match="from 0 to 3"):
        checked_codes(codes + 4, PAIRS, 16, 4)
