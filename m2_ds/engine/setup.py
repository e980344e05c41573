"""From a configuration and a model to a DeepSpeed engine."""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Generator, Iterator
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn

from m2_ds.config import RunConfig
from m2_ds.data.stream import PairBatch, build_loader
from m2_ds.data.text import Tokenizer
from m2_ds.engine.optim import build_optimizer, schedule_builder
from m2_ds.model.encoder import M2Encoder
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)

# What the run's own configuration decides; a DeepSpeed file that sets one of these would be silently overruled.
_OURS = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "micro_batch",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
    "amp": "engine.precision",
}


def deepspeed_config(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """The DeepSpeed file completed from the run's configuration. Raises ValueError that names file and field."""
    path = config.engine.deepspeed
    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise ValueError(
            f"engine.deepspeed: {path} cannot be read ({error.strerror}); paths are relative to where the job started"
        ) from None
    except ValueError as error:
        raise ValueError(f"engine.deepspeed: {path} is not JSON: {error}") from None
    zero = given.get("zero_optimization") if isinstance(given, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        raise ValueError(
            f'engine.deepspeed: {path} must hold {{"zero_optimization": {{"stage": 0, 1, 2 or 3, ...}}, ...}}; '
            f"the stage found there is {stage!r}"
        )
    if config.optim.kind == "muon" and stage > 0:
        raise ValueError(
            f"optim.kind muon works on whole matrices, and ZeRO stage {stage} ({path}) cuts them; set "
            "engine.deepspeed to a file of stage 0 (ds_configs/zero0.json), or optim.kind: adamw"
        )
    for key in _OURS.keys() & given.keys():
        raise ValueError(f"{path} sets {key!r}; set {_OURS[key]} in the recipe instead and remove it there")
    micro_batch, accumulation = config.batch_shape(mesh.data_parallel.size)
    # Reduced once, the micro-batches of a step are one accumulation step to DeepSpeed; without ZeRO it waits anyway.
    coalesced = config.engine.reduce_once and stage > 0
    if stage == 3 and not coalesced and min(config.engine.kept_graphs, accumulation) > 1:
        # It counts accumulated backwards at the forward after each: of two in a row the second replaces the first.
        raise ValueError(
            f"engine.kept_graphs is {config.engine.kept_graphs} and engine.reduce_once is false: DeepSpeed's ZeRO 3 "
            "would lose gradients of consecutive backward passes. Set kept_graphs: 1 or reduce_once: true"
        )
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1 if coalesced else accumulation,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **given,
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    return content


def zero_stage(settings: dict[str, Any]) -> int:
    """Of a `deepspeed_config`."""
    return int(settings["zero_optimization"]["stage"])


def fit_stem(model: M2Encoder, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Fit a conv stem to the first ``init_pictures`` of the stream, the same ones on every rank."""
    count = config.init_pictures
    if count:
        loader = build_loader(config.data, tokenizer, global_batch=count, micro_batch=count, seed=config.seed)
        with contextlib.closing(cast(Generator[PairBatch, None, None], iter(loader))) as batches:
            model.backbone.vision_embed.fit(next(batches).images)


def build_engine(model: nn.Module, config: RunConfig, settings: dict[str, Any], mesh: Mesh) -> Any:
    """Wrap the model: optimizer, schedule, ZeRO as ``settings`` (a `deepspeed_config`) say."""
    optimizer = build_optimizer(model, config.optim, config.engine.precision)
    engine, *_ = deepspeed.initialize(
        model=model.to(mesh.device),
        optimizer=optimizer,
        lr_scheduler=schedule_builder(config.steps, config.optim.schedule),
        config=settings,
        dist_init_required=False,
    )
    _undo_first_step(engine.optimizer)
    log.info(
        "ZeRO stage %d, %s, %d rank(s) on %s", zero_stage(settings), config.engine.precision, mesh.world_size,
        mesh.device.type,
    )  # fmt: skip
    return engine


def _undo_first_step(optimizer: Any) -> None:
    """DeepSpeed's bf16 optimizer without ZeRO takes a step with zero gradients to allocate its state.

    That step decays every weight and counts in Adam's bias correction; no other stage does it.
    """
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, master in low_and_master(optimizer):
            master.data.copy_(low.data)
            if "step" in (state := optimizer.optimizer.state[master]):  # Muon counts none
                state["step"].zero_()


def low_and_master(optimizer: Any) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Weights and their fp32 master copies where DeepSpeed trains low precision without ZeRO; else nothing."""
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups):
            yield from zip(low, masters)


def set_threads(config: RunConfig) -> int:
    """Give each rank of this machine its share of the cores, fewer threads than which torch would not use well."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = len(os.sched_getaffinity(0))
    threads = config.engine.threads or max(1, cores // ranks_here)
    torch.set_num_threads(threads)
    return threads


def quiet() -> None:
    """Only the first rank tells what it does; libraries speak up from warnings on."""
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("m2_ds").setLevel(logging.INFO if first else logging.WARNING)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
