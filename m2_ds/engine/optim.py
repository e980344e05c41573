"""The optimizer's parameter groups, its schedule, and the clamp of the logit scales."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from m2_ds.config import OptimConfig, ParameterRule, ScheduleConfig
from m2_ds.engine.muon import MuonAdamW
from m2_ds.loss.config import LossConfig
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder, canonical_shapes
from m2_ds.model.kernels import fused_adam
from m2_ds.model.stack import Part
from m2_ds.model.weights import LOGIT_SCALES, MASKED_HEADS, canonical_names, freeze_unused, has_adapters, is_adapter

_NOT_DECAYED = ("embed_positions", "cls_token", "mask_token")
_LAYER = re.compile(r"(backbone\.encoder|backbone_vl)\.layers\.(\d+)\.")


def freeze_unreached(model: nn.Module, loss: LossConfig) -> None:
    """Exclude from training what this loss never reaches: without a gradient, some ZeRO stages would still decay it."""
    freeze_unused(model, loss.masked, loss.cmim.weight > 0)
    unreached: list[str] = []
    if loss.unimodal_weight == 0:
        unreached += ["logit_scale", "logit_bias", "itc_text_proj.", "itc_image_proj."]
    if loss.vl_weight == 0:
        unreached += ["logit_vl_scale", "logit_vl_bias", "itc_vl_", *([] if loss.masked else ["backbone_vl."])]
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(unreached)):
            parameter.requires_grad_(False)


def parameter_groups(model: M2Encoder, config: OptimConfig, loss: LossConfig | None = None) -> list[dict[str, Any]]:
    """AdamW groups of the parameters that train, by (learning rate scale, decay); rules may freeze more.

    Beside adapters (m2_ds.model.lora) only what a rule un-freezes trains. A rule's lr_scale multiplies `layer_decay`'s.

    A part of a model has the groups of the whole, in one order, for DeepSpeed takes gradient norms over the stages of a
    pipeline group by group: one that has nothing here holds a number that never trains. ``loss`` is asked for then, to
    know what of the rest is frozen. Raises ValueError for a rule that no parameter matches (most likely a misspelt
    pattern).
    """
    everything = [*canonical_shapes(model.config)] if config.rules else []
    everything += [
        name for inner, _ in model.named_parameters() if is_adapter(inner) for name in canonical_names(inner)
    ]
    for rule in config.rules:
        if not any(re.search(rule.pattern, name) for name in everything):
            raise ValueError(
                f"optim.rules: no weight's name matches '{rule.pattern}'. Names look like "
                "backbone.encoder.layers.0.self_attn.q_proj.A.weight; docs/training.md lists them"
            )
    groups = _by_settings(model, config)
    if model.part != Part.whole(model.config):
        assert loss is not None
        with torch.device("meta"):
            whole = M2Encoder(model.config)
        freeze_unreached(whole, loss)
        filling = {key: [nn.Parameter(torch.zeros(1))] for key in _by_settings(whole, config)}
        groups = {key: groups.get(key, filled) for key, filled in filling.items()}
    if not groups:
        raise ValueError("optim.rules freeze every weight: there is nothing to train")
    return [
        {
            "params": parameters,
            "lr": config.lr * scale,
            "weight_decay": decay,
            "ceiling": ceiling,
            **({"muon": parts > 0, "parts": parts} if config.kind == "muon" else {}),
        }
        for (scale, decay, ceiling, parts), parameters in groups.items()
    ]


_Settings = tuple[float, float, float | None, int]  # learning rate scale, decay, ceiling, matrices that Muon updates


def _by_settings(model: M2Encoder, config: OptimConfig) -> dict[_Settings, list[nn.Parameter]]:
    groups: dict[_Settings, list[nn.Parameter]] = {}
    adapted = has_adapters(model)
    for name, parameter in model.named_parameters():
        names = canonical_names(name)
        rules = [rule for rule in config.rules if any(re.search(rule.pattern, n) for n in names)]
        freeze = _last_set(rules, "freeze")
        if adapted and freeze is False and name.endswith(".base_layer.weight"):
            raise ValueError(
                f"optim.rules un-freeze {names[0]}, which lora adapts: its adapter stands for its change. Make the "
                "pattern narrower, or lora.pattern"
            )
        if freeze or (freeze is None and adapted and not is_adapter(name)):
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            ceiling = math.log(config.max_logit_scale) if name in LOGIT_SCALES else None
            scale, decay = _last_set(rules, "lr_scale"), _last_set(rules, "weight_decay")
            depth = config.layer_decay ** distance_from_top(name, model.config)
            key = (
                depth if scale is None else depth * scale,
                _decay(name, parameter, config) if decay is None else decay,
                ceiling,
                _muon_parts(name, parameter) if config.kind == "muon" else 0,
            )
            groups.setdefault(key, []).append(parameter)
    return groups


def distance_from_top(name: str, model: M2EncoderConfig) -> int:
    """How many layers lie from a weight up to the heads, its own one counted; 0 for heads, scales and the last norm.

    The rule of BEiT (arXiv 2106.08254, appendix) and MAE (arXiv 2111.06377, A.2), over backbone and vision-language
    layers in a row. Embeddings and positions are furthest; the backbone's final norm goes with its last layer.
    """
    depth = model.num_layers + model.num_vl_layers
    if found := _LAYER.match(name):
        return depth - int(found[2]) - (model.num_layers if found[1] == "backbone_vl" else 0)
    if name.startswith("backbone.encoder.layer_norm."):
        return model.num_vl_layers + 1
    return depth + 1 if name.startswith("backbone.") else 0


def _last_set(rules: list[ParameterRule], field: str) -> Any:
    return next((value for rule in reversed(rules) if (value := getattr(rule, field)) is not None), None)


def _decay(name: str, parameter: nn.Parameter, config: OptimConfig) -> float:
    plain = len(getattr(parameter, "ds_shape", parameter.shape)) < 2 or any(part in name for part in _NOT_DECAYED)
    return 0.0 if plain else config.weight_decay


def _muon_parts(name: str, parameter: nn.Parameter) -> int:
    """How many matrices that Muon updates a weight stacks; 0 for what AdamW updates (inputs, outputs, vectors)."""
    if (
        parameter.dim() < 2
        or name.startswith(("itc_", *MASKED_HEADS))
        or any(part in name for part in (*_NOT_DECAYED, "text_embed"))
    ):
        return 0
    return 3 if ".qkv_proj." in name else 1


def build_optimizer(
    model: M2Encoder,
    config: OptimConfig,
    precision: str = "fp32",
    loss: LossConfig | None = None,
    apex: bool = False,
) -> torch.optim.Optimizer:
    """torch's AdamW, fused into one kernel a group, or apex's, or Muon beside it; logit scales are clamped.

    The clamp acts on what the optimizer holds, right after its step: under ZeRO that is the fp32 master copy (padded
    with zeros), from which the engine then refreshes the model's own.
    """
    groups = parameter_groups(model, config, loss)
    optimizer: torch.optim.Optimizer
    if config.kind == "muon":
        compute = torch.bfloat16 if precision == "bf16" else torch.float32
        optimizer = MuonAdamW(
            groups, momentum=config.momentum, compute=compute, lr=config.lr, betas=config.betas, eps=config.eps
        )
    elif apex:
        optimizer = fused_adam()(groups, lr=config.lr, betas=config.betas, eps=config.eps, adam_w_mode=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer.register_step_post_hook(_clamp)
    return optimizer


def _clamp(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    for group in optimizer.param_groups:
        if group.get("ceiling") is not None:
            for parameter in group["params"]:
                parameter.data.clamp_(max=group["ceiling"])


def lr_scale(step: int, steps: int, config: ScheduleConfig) -> float:
    """The factor on the learning rate of ``step`` (from 0) of ``steps``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.final_scale
    if config.kind == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    cooldown = max(1, round(steps * config.cooldown_share))
    left = (steps - step) / cooldown
    return floor + (1 - floor) * max(0.0, min(1.0, left))


def schedule_builder(steps: int, config: ScheduleConfig) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """What DeepSpeed calls with its own optimizer to get the learning rate schedule."""
    return lambda optimizer: LambdaLR(optimizer, lambda step: lr_scale(step, steps, config))
