"""Bytes by kind are those that a real step of two ranks counts; larger jobs by hand."""

from typing import Any

import pytest

from m2_ds.config import RunConfig
from m2_ds.parallel.mesh import Mesh
from m2_ds.plan.layout import Candidate, Load
from m2_ds.plan.memory import stage_parts
from m2_ds.plan.traffic import traffic_of
from m2_ds.plan.trial import Trial, trial_tree
from tests.support.ranks import run_ranks

LENGTHS = (9, 10)  # captions of 9 tokens: nothing is padded
# All tokens but the ends of captions are hidden, so that their number is known.
MASKED: dict[str, Any] = {"cmlm": {"weight": 1.0, "share": 1.0}, "cmim": {"weight": 1.0}}
RANDOM = {"weight": 1.0, "choose": "random"}
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: parallel block, what else differs of a step of 12 pairs in micro-batches of 3
    "data parallel": ({}, {}),
    "bf16, features in bf16": ({}, {"precision": "bf16", "loss": {"exchange": "bf16"}}),
    "no ZeRO": ({}, {"zero": "zero0"}),
    "ZeRO 2, each micro-batch": ({}, {"zero": "zero2", "reduce_once": False}),
    "groups of one": ({"contrast_group": {"size": 1}}, {}),
    "two graphs kept": ({}, {"kept_graphs": 2}),
    "masked": ({}, {"loss": MASKED}),
    "tensor parallel": ({"tensor_parallel_size": 2}, {}),
    "sequence parallel, recomputed": (
        {"tensor_parallel_size": 2, "sequence_parallel": True},
        {"recompute": "full", "precision": "bf16"},
    ),
    "tensor parallel, one level": ({"tensor_parallel_size": 2}, {"loss": {"unimodal_weight": 0}}),
    "masked, tensor parallel": ({"tensor_parallel_size": 2}, {"loss": MASKED, "vocab_size": 601}),
    "masked words, tensor parallel, recomputed": (
        {"tensor_parallel_size": 2},
        {"loss": {"cmlm": MASKED["cmlm"]}, "recompute": "full", "precision": "bf16"},
    ),
    "pipeline": ({"pipeline_parallel_size": 2}, {}),  # last: DeepSpeed keeps its groups
    "masked patches, pipeline": ({"pipeline_parallel_size": 2}, {"loss": {"cmim": RANDOM}}),
    "masked, pipeline": ({"pipeline_parallel_size": 2}, {"loss": {**MASKED, "cmim": RANDOM}}),
}
MODEL = {"preset": "test", "num_layers": 3, "num_vl_layers": 2}


def tree_of(job: str) -> dict[str, Any]:
    parallel, more = JOBS[job]
    more = dict(more)
    model = {**MODEL, "recompute": more.pop("recompute", "none"), "vocab_size": more.pop("vocab_size", 600)}
    tree = trial_tree(model, more.pop("zero", "zero1"), 12, 3, more.pop("precision", "fp32"))
    tree["loss"] = more.pop("loss", {})
    tree["engine"] |= more
    return {**tree, "parallel": parallel}


def count(mesh: Mesh, jobs: list[str]) -> dict[str, dict[str, float]]:
    """Bytes of the third step by job and kind."""
    found = {}
    for job in jobs:
        config = RunConfig.model_validate(tree_of(job))
        here = mesh.with_layout(config.parallel)
        trial = Trial(config, here, LENGTHS)
        trial.run(2)
        mesh.traffic.take()
        trial.run(1)
        found[job], _ = mesh.traffic.take()
        trial.close()
    return found


def predicted(job: str, rank: int) -> dict[str, float]:
    config = RunConfig.model_validate(tree_of(job))
    candidate = Candidate.of(config, 2)
    load = Load.of(config, LENGTHS[0])
    stage = rank if candidate.pipeline > 1 else 0
    stages = stage_parts(config, candidate.pipeline)
    return traffic_of(config, candidate, load, True, stages, stage, exactly=True).sent


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_a_step_sends_what_was_predicted() -> None:
    for rank, by_job in enumerate(run_ranks(2, count, list(JOBS), seconds=180)):
        for job, counted in by_job.items():
            # DeepSpeed's pipelines tell each other two numbers.
            sent = {k: x for k, x in counted.items() if k not in ("control", "log") and x > 8}
            wanted = {k: x for k, x in predicted(job, rank).items() if k != "batches"}
            assert sent == pytest.approx(wanted, rel=1e-12), (job, rank)
            assert sent, job


def test_what_grows_with_ranks_groups_and_micro_batches() -> None:
    config = RunConfig.model_validate(tree_of("data parallel"))
    load = Load.of(config, 9)

    def sent(data: int, group: int, k: int) -> dict[str, float]:
        candidate = Candidate(1, 1, data, "zero1", group, 3, k, "none")
        return traffic_of(config, candidate, load, False, stage_parts(config, 1), 0).sent

    small, large = sent(2, 2, 1), sent(64, 8, 4)
    assert large["features"] == 7 * 4 * small["features"]
    assert large["log-sum-exp"] == 7 * 4 * small["log-sum-exp"]
    assert large["gradients"] == pytest.approx(2 * 63 / 64 * small["gradients"])
    assert "features" not in sent(8, 1, 2)
