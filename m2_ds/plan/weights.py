"""How many parameters a rank holds: counted on its part of the model, built without memory."""

from dataclasses import dataclass
from functools import cache

import torch

from m2_ds.config import OptimConfig, RunConfig
from m2_ds.engine.optim import freeze_unreached, parameter_groups
from m2_ds.loss.config import LossConfig
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.layers import WHOLE, Layers
from m2_ds.model.stack import Part
from m2_ds.parallel.config import Layout
from m2_ds.parallel.mesh import Mesh


@dataclass(frozen=True)
class Weights:
    """Of one rank, before ZeRO: numbers in all, that train, of the largest that trains, and how many tensors train."""

    all: int
    trained: int
    largest: int
    tensors: int


def weights_of(config: RunConfig, part: Part, ranks: int) -> Weights:
    """A part's share on each of ``ranks`` tensor-parallel ranks (the first: all are equal)."""
    return _weights(config.model.model_copy(update={"recompute": "none"}), config.loss, config.optim, part, ranks)


@cache
def _frozen_model(model: M2EncoderConfig, loss: LossConfig, part: Part, ranks: int) -> M2Encoder:
    with torch.device("meta"):
        built = M2Encoder(model, _layers(ranks), part)
    freeze_unreached(built, loss)
    return built


def _weights(model: M2EncoderConfig, loss: LossConfig, optim: OptimConfig, part: Part, ranks: int) -> Weights:
    built = _frozen_model(model, loss, part, ranks)
    everything = sum(p.numel() for p in built.parameters())
    if optim.rules:
        trained = [p.numel() for group in parameter_groups(built, optim, loss) for p in group["params"]]
    else:
        trained = [p.numel() for p in built.parameters() if p.requires_grad]
    return Weights(everything, sum(trained), max(trained, default=0), len(trained))


def group_sizes(config: RunConfig, part: Part, ranks: int) -> list[int]:
    """Numbers of each of the optimizer's groups on a rank: ZeRO pads and gathers them one by one."""
    model = config.model.model_copy(update={"recompute": "none"})
    groups = parameter_groups(_frozen_model(model, config.loss, part, ranks), config.optim, config.loss)
    return [sum(p.numel() for p in group["params"]) for group in groups]


def _layers(ranks: int) -> Layers:
    if ranks == 1:
        return WHOLE
    from m2_ds.parallel.tensor import TensorParallelLayers  # imports Megatron-core, seconds

    return TensorParallelLayers(Mesh.imagined(Layout(ranks, 1, 1)).tensor)
