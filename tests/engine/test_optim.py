"""Which weights get which learning rate and decay, and the learning rate over the steps."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from m2_ds.config import OptimConfig, ParameterRule, ScheduleConfig
from m2_ds.engine.optim import build_optimizer, freeze_unreached, lr_scale, parameter_groups
from m2_ds.loss.config import LossConfig
from m2_ds.model import lora
from m2_ds.model.config import LoraConfig, M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.pipeline import parts
from m2_ds.model.weights import is_adapter


@pytest.fixture
def model() -> M2Encoder:
    model = M2Encoder(M2EncoderConfig.preset("test"))
    freeze_unreached(model, LossConfig())
    return model


def by_name(model: nn.Module, config: OptimConfig) -> dict[str, dict[str, Any]]:
    """The group of each weight that trains."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    return {names[p]: group for group in groups for p in group["params"]}  # type: ignore[attr-defined]


def test_matrices_decay_and_nothing_else(model: M2Encoder) -> None:
    found = by_name(model, OptimConfig(weight_decay=0.3))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    decayed = {name for name, group in found.items() if group["weight_decay"] == 0.3}
    assert {found[name]["weight_decay"] for name in found.keys() - decayed} == {0.0}
    layer = "backbone.encoder.layers.0"
    assert {
        f"{layer}.self_attn.qkv_proj.A.weight",
        f"{layer}.ffn.B.fc2.weight",
        "itc_vl_image_proj.fc.weight",
    } <= decayed
    assert {"backbone.text_embed.weight", "backbone.vision_embed.proj.weight"} <= decayed
    for part in ("bias", "layer_norm", "layernorm", "attn_ln", "embed_positions", "cls_token", "logit"):
        assert not [name for name in decayed if part in name], part


def test_rules_apply_in_order_and_the_last_match_decides(model: M2Encoder) -> None:
    rules = [
        ParameterRule(pattern=r"^backbone\.encoder", lr_scale=0.5, weight_decay=0.0),
        ParameterRule(pattern=r"layers\.1\.", lr_scale=0.1),
        ParameterRule(pattern=r"\.q_proj\.A\.", lr_scale=3.0),  # canonical names, though q, k, v are one weight inside
        ParameterRule(pattern=r"text_embed", freeze=True),
    ]
    found = by_name(model, OptimConfig(lr=1.0, weight_decay=0.2, rules=rules))

    def of(name: str) -> tuple[float, float]:
        return found[name]["lr"], found[name]["weight_decay"]

    assert of("backbone.encoder.layers.0.ffn.A.fc1.weight") == (0.5, 0.0)
    assert of("backbone.encoder.layers.1.ffn.A.fc1.weight") == (0.1, 0.0)
    assert of("backbone.encoder.layers.1.self_attn.qkv_proj.A.weight") == (3.0, 0.0)
    assert of("backbone.encoder.layers.1.self_attn.qkv_proj.B.weight") == (0.1, 0.0)
    assert of("backbone_vl.layers.0.ffn.A.fc1.weight") == (1.0, 0.2)
    assert "backbone.text_embed.weight" not in found
    assert not model.backbone.text_embed.weight.requires_grad


def test_a_rule_changes_only_what_it_sets(model: M2Encoder) -> None:
    rules = [
        ParameterRule(pattern=r".", freeze=True, lr_scale=0.5),
        ParameterRule(pattern=r"^itc_|pooler", freeze=False),
        ParameterRule(pattern=r"itc_vl", weight_decay=0.0),
    ]
    found = by_name(model, OptimConfig(lr=1.0, weight_decay=0.2, rules=rules))
    assert found.keys() == {f"itc_{level}{kind}_proj.fc.weight" for level in ("", "vl_") for kind in ("image", "text")}
    assert {group["lr"] for group in found.values()} == {0.5}
    assert found["itc_text_proj.fc.weight"]["weight_decay"] == 0.2
    assert found["itc_vl_text_proj.fc.weight"]["weight_decay"] == 0.0


def test_a_rule_that_matches_nothing_is_refused(model: M2Encoder) -> None:
    with pytest.raises(ValueError, match=r"optim.rules: no weight's name matches 'backbon\\.'"):
        parameter_groups(model, OptimConfig(rules=[ParameterRule(pattern=r"backbon\.")]))


def test_freezing_everything_is_refused(model: M2Encoder) -> None:
    with pytest.raises(ValueError, match="optim.rules freeze every weight"):
        parameter_groups(model, OptimConfig(rules=[ParameterRule(pattern=r".", freeze=True)]))


@pytest.mark.parametrize(
    ("loss", "left"),
    [
        (LossConfig(), ()),
        (LossConfig(unimodal_weight=0), ("logit_scale", "itc_text_proj.", "itc_image_proj.")),
        (LossConfig(vl_weight=0), ("logit_vl_scale", "itc_vl_text_proj.", "itc_vl_image_proj.", "backbone_vl.")),
    ],
)
def test_what_trains_is_what_gets_a_gradient(loss: LossConfig, left: tuple[str, ...]) -> None:
    model = M2Encoder(M2EncoderConfig.preset("test"))
    freeze_unreached(model, loss)
    ids = torch.ones(2, 3, dtype=torch.int64)
    image, text, ((scale, vl_scale), _), _ = model(torch.rand(2, 3, 32, 32), ids, ids)
    total = torch.zeros(())
    if loss.unimodal_weight:
        total = total + (image.unimodal @ text.unimodal.T).sum() * scale.sum()
    if loss.vl_weight:
        total = total + (image.vl @ text.vl.T).sum() * vl_scale.sum()
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert not (parameter.requires_grad and name.startswith(left or "nothing")), name


DEPTHS = {  # of two backbone layers and one above them: how far from the heads
    "logit_scale": 0,
    "logit_vl_scale": 0,
    "itc_text_proj.fc.weight": 0,
    "itc_vl_image_proj.fc.weight": 0,
    "backbone_vl.layer_norm.A.weight": 0,
    "backbone_vl.layers.0.self_attn.qkv_proj.A.weight": 1,
    "backbone_vl.layers.0.ffn.A.fc1.bias": 1,
    "backbone.encoder.layer_norm.B.bias": 2,
    "backbone.encoder.layers.1.ffn.B.fc2.weight": 2,
    "backbone.encoder.layers.1.self_attn.qkv_proj.B.weight": 2,
    "backbone.encoder.layers.0.self_attn.qkv_proj.A.weight": 3,
    "backbone.encoder.layers.0.self_attn_layer_norm.A.weight": 3,
    "backbone.encoder.embed_positions.A.weight": 4,
    "backbone.encoder.embed_positions.B.weight": 4,
    "backbone.text_embed.weight": 4,
    "backbone.vision_embed.cls_token": 4,
    "backbone.vision_embed.proj.weight": 4,
}


def test_learning_rates_fall_with_depth(model: M2Encoder) -> None:
    found = by_name(model, OptimConfig(lr=2.0, weight_decay=0.2, layer_decay=0.75))
    for name, depth in DEPTHS.items():
        assert found[name]["lr"] == pytest.approx(2 * 0.75**depth), name
    assert {round(math.log(group["lr"] / 2, 0.75)) for group in found.values()} == set(DEPTHS.values())
    assert found["backbone.text_embed.weight"]["weight_decay"] == 0.2  # decay is as it was
    assert {group["lr"] for group in by_name(model, OptimConfig(lr=2.0)).values()} == {2.0}


def test_a_rule_multiplies_what_depth_gives(model: M2Encoder) -> None:
    rules = [
        ParameterRule(pattern=r"\.k_proj\.A\.|text_embed", lr_scale=0.5),
        ParameterRule(pattern="^itc_", lr_scale=3),
    ]
    found = by_name(model, OptimConfig(lr=1.0, layer_decay=0.5, rules=rules))
    assert found["backbone.text_embed.weight"]["lr"] == 0.5 * 0.5**4
    assert found["backbone.encoder.layers.1.self_attn.qkv_proj.A.weight"]["lr"] == 0.5 * 0.5**2
    assert found["backbone.encoder.layers.1.self_attn.qkv_proj.B.weight"]["lr"] == 0.5**2
    assert found["itc_vl_text_proj.fc.weight"]["lr"] == 3


def test_every_stage_of_a_pipeline_has_the_groups_of_the_whole(model: M2Encoder) -> None:
    config, loss = OptimConfig(layer_decay=0.75, rules=[ParameterRule(pattern="logit_", lr_scale=5)]), LossConfig()

    def kinds(groups: list[dict[str, Any]]) -> list[tuple[float, float]]:
        return [(group["lr"], group["weight_decay"]) for group in groups]

    whole = kinds(parameter_groups(model, config))
    assert len(whole) == 2 * 5 + 1  # five depths with and without decay (heads have no bias), and the logit scales
    for stage in parts(model.config, [1, 1, 1]):
        part = M2Encoder(model.config, part=stage)
        freeze_unreached(part, loss)
        assert sorted(kinds(parameter_groups(part, config, loss))) == sorted(whole)


def adapted(model: M2Encoder) -> M2Encoder:
    layers = lora.adaptable(model, LoraConfig().pattern)
    lora.add_adapters(model, LoraConfig(), layers, "base", "digest")
    return model


def test_beside_adapters_only_what_a_rule_un_freezes_trains(model: M2Encoder) -> None:
    found = by_name(adapted(model), OptimConfig(lr=1.0, weight_decay=0.2, layer_decay=0.5))
    assert all(is_adapter(name) for name in found) and len(found) == 2 * (2 * 8 + 4)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in found)
    layer = "backbone.encoder.layers.0"
    assert found[f"{layer}.ffn.A.fc1.lora_A.default.weight"]["lr"] == 0.5**3
    assert found[f"{layer}.ffn.A.fc1.lora_A.default.weight"]["weight_decay"] == 0.2
    assert found["backbone_vl.layers.0.self_attn.qkv_proj.A.lora_B.default.weight"]["lr"] == 0.5


def test_rules_find_adapters_by_the_names_of_their_layers(model: M2Encoder) -> None:
    rules = [
        ParameterRule(pattern=r"\.v_proj\.A\.", lr_scale=0.1),
        ParameterRule(pattern=r"lora_B", weight_decay=0.0),
        ParameterRule(pattern=r"ffn\.B.*lora_", freeze=True),
        ParameterRule(pattern=r"^logit_|pooler", freeze=False),
    ]
    found = by_name(adapted(model), OptimConfig(lr=1.0, weight_decay=0.2, rules=rules))
    layer = "backbone.encoder.layers.1"
    assert found[f"{layer}.self_attn.qkv_proj.A.lora_A.default.weight"]["lr"] == 0.1
    assert found[f"{layer}.self_attn.qkv_proj.B.lora_A.default.weight"]["lr"] == 1.0
    assert found[f"{layer}.self_attn.qkv_proj.A.lora_B.default.weight"]["weight_decay"] == 0.0
    assert f"{layer}.ffn.B.fc1.lora_A.default.weight" not in found
    assert {name for name in found if not is_adapter(name)} == {"logit_scale", "logit_vl_scale"}


def test_a_weight_that_has_an_adapter_does_not_train_itself(model: M2Encoder) -> None:
    with pytest.raises(ValueError, match=r"optim.rules un-freeze backbone.encoder.layers.0.self_attn.q_proj.A.weight"):
        parameter_groups(adapted(model), OptimConfig(rules=[ParameterRule(pattern=r"\.q_proj\.A", freeze=False)]))


def test_logit_scales_stay_under_their_ceiling(model: M2Encoder) -> None:
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, max_logit_scale=20.0, weight_decay=0.0))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = -torch.ones_like(parameter)
        optimizer.step()
    assert model.logit_scale.exp().item() == pytest.approx(20)
    assert model.logit_vl_scale.exp().item() == pytest.approx(20)
    assert model.itc_vl_text_proj.fc.weight.max() > 2  # others are free


@pytest.mark.parametrize(
    ("config", "step", "factor"),
    [
        (ScheduleConfig(warmup_steps=4), 0, 0.25),
        (ScheduleConfig(warmup_steps=4), 3, 1.0),
        (ScheduleConfig(warmup_steps=4), 4, 1.0),
        (ScheduleConfig(), 0, 1.0),
        (ScheduleConfig(), 25, 0.5 + 0.5 * math.cos(math.pi / 4)),
        (ScheduleConfig(), 50, 0.5),
        (ScheduleConfig(warmup_steps=20), 60, 0.5),
        (ScheduleConfig(final_scale=0.2), 50, 0.6),
        (ScheduleConfig(final_scale=0.2), 100, 0.2),
        (ScheduleConfig(final_scale=0.2), 500, 0.2),
        (ScheduleConfig(kind="constant"), 79, 1.0),
        (ScheduleConfig(kind="constant"), 80, 1.0),
        (ScheduleConfig(kind="constant"), 90, 0.5),
        (ScheduleConfig(kind="constant"), 99, 0.05),
        (ScheduleConfig(kind="constant", warmup_steps=10), 4, 0.5),
        (ScheduleConfig(kind="constant", cooldown_share=0.5, final_scale=0.5), 75, 0.75),
        (ScheduleConfig(kind="constant", cooldown_share=0.0), 99, 1.0),
    ],
)
def test_the_learning_rate_at_a_step(config: ScheduleConfig, step: int, factor: float) -> None:
    assert lr_scale(step, 100, config) == pytest.approx(factor)
