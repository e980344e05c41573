"""The step in tensor- and pipeline-parallel layouts: gradients and clip norm against giant batches in one process."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

import m2_ds
from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.evaluation.run import run_evaluations
from m2_ds.parallel.mesh import Mesh
from m2_ds.train import run
from tests.engine.cases import Case, check, run_cases, run_curves
from tests.engine.jobs import changed, config_of, curve, log_lines
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.timeout(400), pytest.mark.distributed]
SEQUENCE = (("parallel.sequence_parallel", True),)
RECOMPUTE = (("model.recompute", "full"),)
SELECTIVE = (("model.recompute", "selective"),)


def test_two_tensor_parallel_ranks(recipe: dict[str, Any], deepspeed_files: dict[str, Path]) -> None:
    cases = [
        *(Case(stage, 1, k, tensor=2) for stage in ("zero1", "zero2", "zero3") for k in (1, 3)),
        *(Case("zero2", 1, 2, tensor=2, changes=changes) for changes in (SEQUENCE, RECOMPUTE, SELECTIVE)),
        *(Case("zero1", 1, 2, tensor=2, changes=SEQUENCE + changes) for changes in (RECOMPUTE, SELECTIVE)),
        Case("zero2_offload", 1, 2, tensor=2),
        Case("zero3_offload", 1, 2, tensor=2),
        Case("zero1", 1, 2, tensor=2, partial=1),
        Case("zero1", 1, 2, tensor=2, changes=(("loss.form", "sigmoid"), ("model.logit_bias", True))),
        Case("zero1", 1, 2, tensor=2, changes=(("loss.repeats", "exclude"), ("loss.label_smoothing", 0.1))),
        Case("zero1", 1, 2, tensor=2, changes=(("model.vocab_size", 601), ("model.stem", "conv"))),
    ]
    for reports in run_ranks(2, run_cases, recipe, deepspeed_files, cases, seconds=300):
        check(reports)


def test_two_stages(recipe: dict[str, Any], deepspeed_files: dict[str, Path]) -> None:
    cases = [
        *(Case("zero1", 1, k, pipeline=2) for k in (1, 2, 4)),
        *(Case("zero1", 1, 2, pipeline=2, changes=(("parallel.pipeline_layers", n),)) for n in ([1, 2], [2, 1])),
        *(Case("zero1", 1, 2, pipeline=2, changes=changes) for changes in (RECOMPUTE, SELECTIVE)),
        Case("zero1", 1, 2, pipeline=2, partial=0),
        Case("zero1", 1, 3, pipeline=2, changes=(("loss.unimodal_weight", 0.0),)),
        Case("zero1", 1, 2, pipeline=2, changes=(("loss.form", "sigmoid"), ("model.logit_bias", True))),
    ]
    for reports in run_ranks(2, run_cases, recipe, deepspeed_files, cases, seconds=300):
        check(reports)


# (ranks, sizes of tensor and pipeline); the rest is data-parallel.
LAYOUTS = [(2, 2, 1), (2, 1, 2), (4, 2, 2), (4, 2, 1), (4, 1, 2), (8, 2, 2)]


@pytest.mark.parametrize("ranks", [4, 8])
def test_all_axes_together(recipe: dict[str, Any], deepspeed_files: dict[str, Path], ranks: int) -> None:
    cases = []
    for _, tensor, pipeline in (layout for layout in LAYOUTS if layout[0] == ranks):
        data = ranks // (tensor * pipeline)
        stages = ("zero1",) if pipeline > 1 else ("zero1", "zero2", "zero3")
        cases += [Case(stage, group, 2, tensor, pipeline) for stage in stages for group in {1, data}]
    cases.append(Case("zero1", 1, 2, 2, 2, changes=SEQUENCE + RECOMPUTE))
    for reports in run_ranks(ranks, run_cases, recipe, deepspeed_files, cases, seconds=300):
        check(reports)


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (4, 8))])
def test_loss_curves_of_twenty_steps(recipe: dict[str, Any], deepspeed_files: dict[str, Path], ranks: int) -> None:
    cases = []
    for _, tensor, pipeline in (layout for layout in LAYOUTS if layout[0] == ranks):
        cases += [Case("zero1", group, 2, tensor, pipeline) for group in {1, ranks // (tensor * pipeline)}]
    settings = {**recipe, "steps": 20}
    for curves in run_ranks(ranks, run_curves, settings, deepspeed_files, cases, 20, seconds=300):
        for case, found, wanted in curves:
            assert wanted[-1][0] < wanted[0][0], case
            for (loss, norm), (wanted_loss, wanted_norm) in zip(found, wanted):
                assert loss == pytest.approx(wanted_loss, rel=1e-5), case
                assert norm == pytest.approx(wanted_norm, rel=1e-4), case


@pytest.mark.slow
def test_bf16_in_every_layout(recipe: dict[str, Any], deepspeed_files: dict[str, Path]) -> None:
    bf16 = (("engine.precision", "bf16"),)
    cases = [Case("zero1", 1, 2, *sizes, changes=bf16) for sizes in ((2, 2), (2, 1), (1, 2))]
    cases += [Case("zero3", 1, 2, 2, 1, changes=bf16), Case("zero1", 1, 2, 2, 2, changes=bf16 + SEQUENCE + RECOMPUTE)]
    for curves in run_ranks(4, run_curves, {**recipe, "steps": 6}, deepspeed_files, cases, 6, seconds=300):
        for case, found, wanted in curves:
            for (loss, norm), (wanted_loss, wanted_norm) in zip(found, wanted):
                assert loss == pytest.approx(wanted_loss, rel=0.02), case
                assert norm == pytest.approx(wanted_norm, rel=0.15), case


def train_in_layouts(mesh: Mesh, trees: list[dict[str, Any]]) -> None:
    for tree in trees:
        config = config_of(tree)
        run(config, mesh.with_layout(config.parallel))


def test_training_and_evaluation_in_every_layout(
    recipe: dict[str, Any], deepspeed_files: dict[str, Path], shapes: Path, tmp_path: Path
) -> None:
    task = {"kind": "retrieval", "dataset": str(shapes), "splits": ["test"]}
    layouts = {"dense": (1, 1, False), "tensor": (2, 1, False), "sequence": (2, 1, True), "pipeline": (1, 2, False)}
    trees = [
        changed(
            recipe,
            {
                "folder": str(tmp_path / name),
                "steps": 4,
                "micro_batch": 4,
                "engine.deepspeed": str(deepspeed_files["zero1"]),
                "parallel": {
                    "tensor_parallel_size": tensor,
                    "pipeline_parallel_size": pipeline,
                    "sequence_parallel": sequence,
                },
                "evaluation": {"tasks": [task], "every": 2, "batch_size": 5},
            },
        )
        for name, (tensor, pipeline, sequence) in layouts.items()
    ]
    run_ranks(2, train_in_layouts, trees, seconds=200)
    losses = curve(tmp_path / "dense")
    for name in layouts:
        assert_close(curve(tmp_path / name), losses, rtol=1e-5, atol=0)
        lines = log_lines(tmp_path / name)
        assert all(("bubble_share" in line) == (name == "pipeline") for line in lines)
        assert all(0 < line.get("bubble_share", 0.5) < 1 and line["contrastive_batch"] == 16 for line in lines)
        assert all(("sent_mb/tensor parallel norms" in line) == (name in ("tensor", "sequence")) for line in lines)
        model, processor = m2_ds.load(tmp_path / name)
        wanted = run_evaluations(model, processor, EvaluationConfig.model_validate({"tasks": [task]}))
        found = json.loads((tmp_path / name / "evaluation/step-00000004.json").read_text())["metrics"]
        assert found == pytest.approx(wanted) and len(wanted) > 5
