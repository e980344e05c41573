"""How much a run holds and writes, from its configuration alone: lower bounds, activations not counted."""

from dataclasses import dataclass

import torch

from m2_ds.config import RunConfig
from m2_ds.engine.optim import freeze_unreached, parameter_groups
from m2_ds.model.encoder import M2Encoder
from m2_ds.parallel.config import Layout


@dataclass(frozen=True)
class Numbers:
    """Weights of the whole model, those that train, and the optimizer's numbers for them (AdamW: two each)."""

    weights: int
    trained: int
    states: int


def numbers(config: RunConfig) -> Numbers:
    """Counted on a model without memory. A LoRA run's adapters, a per cent or so of the weights, are left out.

    Raises ValueError as the optimizer does, for a rule that matches nothing or freezes everything.
    """
    with torch.device("meta"):
        model = M2Encoder(config.model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if config.lora is not None:
        return Numbers(weights, 0, 0)
    freeze_unreached(model, config.loss)
    trained = states = 0
    for group in parameter_groups(model, config.optim, config.loss):
        count = sum(parameter.numel() for parameter in group["params"])
        trained += count
        states += count if group.get("muon") else 2 * count
    return Numbers(weights, trained, states)


def checkpoint_bytes(count: Numbers) -> int:
    """Of one checkpoint: weights and the optimizer's state, all in fp32."""
    return 4 * (count.weights + count.states)


def kept_checkpoints(config: RunConfig) -> int:
    """How many lie in the run folder at once when there are most: those kept, and the one being written."""
    every = config.checkpoint.every or config.steps
    written = -(-config.steps // every)
    kept_for_good = config.steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
    return min(written, config.checkpoint.keep + kept_for_good) + (written > config.checkpoint.keep)


def state_bytes(config: RunConfig, count: Numbers, layout: Layout, zero_stage: int) -> float:
    """Of one rank: weights, gradients and the optimizer, as ZeRO partitions them (arXiv 1910.02054, section 5)."""
    low = 2 if config.engine.precision == "bf16" else 4
    cut = layout.tensor * layout.pipeline
    masters = 4 * count.trained if config.engine.precision == "bf16" else 0
    weights, gradients, optimizer = low * count.weights, low * count.trained, 4 * count.states + masters
    data = layout.data
    return (
        weights / (data if zero_stage >= 3 else 1)
        + gradients / (data if zero_stage >= 2 else 1)
        + optimizer / (data if zero_stage >= 1 else 1)
    ) / cut


def batch_bytes(config: RunConfig, pairs: int) -> int:
    """Of a micro-batch as loader processes hand it over: pictures as bytes, captions as two int64 tensors."""
    captions = len(config.data.languages) if config.data.captions == "each" else 1
    return pairs * (3 * config.data.image_size**2 + 16 * captions * config.model.max_text_length)
