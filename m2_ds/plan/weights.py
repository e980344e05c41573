"""How many parameters a rank holds: counted on its part of the model, built without memory.

Tensor parallelism cuts what m2_ds.parallel.tensor cuts. Its layers cannot be built for this: Megatron-core's know their
cut in a job that runs only. tests/plan/test_weights.py holds the two together.
"""

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from m2_ds.config import RunConfig
from m2_ds.engine.optim import freeze_unreached, parameter_groups
from m2_ds.loss.config import LossConfig
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.stack import Part

_CUT = re.compile(r"\.(qkv_proj|inner_attn_ln|ffn_layernorm|fc1)\.|\.(out_proj|fc2)\.([AB]\.)?weight$")
_VOCABULARY = (
    "backbone.text_embed.weight",
    "masked_text_head.vocabulary.weight",
    "masked_text_head.vocabulary.bias",
)


@dataclass(frozen=True)
class Weights:
    """Of one rank, before ZeRO: numbers in all, that train, of the largest that trains, and how many tensors train."""

    all: int
    trained: int
    largest: int
    tensors: int


def weights_of(config: RunConfig, part: Part, ranks: int) -> Weights:
    """A part's share on each of ``ranks`` tensor-parallel ranks (the first: all are equal)."""
    if config.optim.rules:
        trained = [n for group in _groups(config, part, ranks) for n in group]
        return Weights(sum(_numbers(_model(config, part), ranks).values()), sum(trained), max(trained), len(trained))
    return _weights(_plain(config.model), config.loss, part, ranks)


def group_sizes(config: RunConfig, part: Part, ranks: int) -> list[int]:
    """Numbers of each of the optimizer's groups on a rank: ZeRO pads and gathers them one by one."""
    return [sum(group) for group in _groups(config, part, ranks)]


def _groups(config: RunConfig, part: Part, ranks: int) -> list[list[int]]:
    model = _model(config, part)
    sizes = _numbers(model, ranks)
    named = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, config.optim, config.loss)
    # A part holds a number that never trains in place of a group that is elsewhere.
    return [[sizes[named[id(p)]] if id(p) in named else p.numel() for p in group["params"]] for group in groups]


@cache
def _weights(model: M2EncoderConfig, loss: LossConfig, part: Part, ranks: int) -> Weights:
    """Summed over layers, of which each kind is looked at once: a deep model takes seconds to build even without
    memory."""
    times = {
        "backbone layer": len(part.layers(0, model.num_layers)),
        "vl layer": len(part.layers(model.num_layers, model.num_vl_layers)),
        "backbone end": int(part.has_backbone_end(model)),
        "first": int(part.is_first),
        "last": int(part.is_last),
    }
    built = _fresh(model.model_copy(update={"num_layers": 1, "num_vl_layers": 1}), loss, None)
    sizes = _numbers(built, ranks)
    everything = trained = largest = tensors = 0
    for name, parameter in built.named_parameters():
        count, size = times[_piece(name)], sizes[name]
        everything += count * size
        if parameter.requires_grad and count:
            trained, tensors, largest = trained + count * size, tensors + count, max(largest, size)
    return Weights(everything, trained, largest, tensors)


def _piece(name: str) -> str:
    """What of a model a weight belongs to (m2_ds.model.encoder)."""
    if name.startswith("backbone.encoder.layers."):
        return "backbone layer"
    if name.startswith("backbone_vl.layers."):
        return "vl layer"
    if name.startswith("backbone.encoder.layer_norm."):
        return "backbone end"
    return "first" if name.startswith("backbone.") else "last"


def _numbers(model: nn.Module, ranks: int) -> dict[str, int]:
    return {name: _share(name, p, ranks) for name, p in model.named_parameters()}


def _share(name: str, parameter: nn.Parameter, ranks: int) -> int:
    if name in _VOCABULARY:  # filled up where the ranks do not divide the words
        return -(-len(parameter) // ranks) * (parameter.numel() // len(parameter))
    return parameter.numel() // ranks if _CUT.search(name) else parameter.numel()


def _plain(model: M2EncoderConfig) -> M2EncoderConfig:
    return model.model_copy(update={"recompute": "none"})


def _model(config: RunConfig, part: Part) -> M2Encoder:
    """A model of its own: rules freeze parameters of it."""
    return _fresh(_plain(config.model), config.loss, part)


def _fresh(model: M2EncoderConfig, loss: LossConfig, part: Part | None) -> M2Encoder:
    with torch.device("meta"):
        built = M2Encoder(model, part=part)
    freeze_unreached(built, loss)
    return built
