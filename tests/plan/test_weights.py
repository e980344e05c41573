"""Parameters of a rank, counted by kind of layer, against models that are built."""

from typing import Any

import pytest
import torch

from m2_ds.config import RunConfig
from m2_ds.engine.optim import freeze_unreached
from m2_ds.engine.setup import build_model
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.stack import Part
from m2_ds.parallel.config import ParallelConfig
from m2_ds.parallel.mesh import Mesh
from m2_ds.plan.memory import stage_parts
from m2_ds.plan.trial import trial_tree
from m2_ds.plan.weights import Weights, group_sizes, weights_of
from tests.support.ranks import run_ranks


def config_of(model: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    tree = trial_tree({"preset": "test", "num_layers": 3, "num_vl_layers": 2, **(model or {})}, "zero1", 8, 4, "fp32")
    return RunConfig.model_validate({**tree, **more})


def counted(model: torch.nn.Module) -> Weights:
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return Weights(sum(p.numel() for p in model.parameters()), sum(trained), max(trained), len(trained))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"loss": {"unimodal_weight": 0}},
        {"loss": {"form": "sigmoid"}, "model": {"logit_bias": True}},
        {"loss": {"cmlm": {"weight": 1.0}}},
        {"loss": {"cmlm": {"weight": 1.0}, "cmim": {"weight": 1.0, "choose": "random"}}},
    ],
    ids=["both levels", "one level", "sigmoid", "masked words", "masked words and patches"],
)
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_every_stage_is_counted_as_it_is_built(more: dict[str, Any], stages: int) -> None:
    config = config_of(**{"model": None, **more})
    found = []
    for part in stage_parts(config, stages):
        with torch.device("meta"):
            model = M2Encoder(config.model, part=part)
        freeze_unreached(model, config.loss)
        assert weights_of(config, part, 1) == counted(model)
        found.append(weights_of(config, part, 1).all)
    assert sum(found) == weights_of(config, Part.whole(config.model), 1).all


def test_rules_freeze_and_groups_hold_what_trains() -> None:
    rules = [{"pattern": r"\.fc1\.", "freeze": True}, {"pattern": "text_embed", "lr_scale": 0.5}]
    config = config_of(optim={"rules": rules})
    whole = Part.whole(config.model)
    less = weights_of(config, whole, 1)
    assert less.trained < weights_of(config_of(), whole, 1).trained
    sizes = group_sizes(config, whole, 1)
    assert sum(sizes) == less.trained and config.model.vocab_size * config.model.hidden_size in sizes


def of_a_rank(mesh: Mesh, tree: dict[str, Any]) -> Weights:
    config = RunConfig.model_validate(tree)
    here = mesh.with_layout(ParallelConfig(tensor_parallel_size=2))
    _, model = build_model(config, {"zero_optimization": {"stage": 1}}, here)
    freeze_unreached(model, config.loss)
    return counted(model)


@pytest.mark.distributed
@pytest.mark.timeout(90)
def test_tensor_parallel_ranks_hold_what_the_rule_cuts() -> None:
    """With heads of masked objectives: the vocabulary is cut where it is looked up and where it is scored."""
    config = config_of({"vocab_size": 601}, loss={"cmlm": {"weight": 1.0}, "cmim": {"weight": 1.0}})
    wanted = weights_of(config, Part.whole(config.model), 2)
    assert run_ranks(2, of_a_rank, config.model_dump(mode="json")) == [wanted, wanted]
