"""From a configuration and a model to a DeepSpeed engine."""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
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
from m2_ds.model.kernels import choose
from m2_ds.model.layers import Layers, WholeLayers
from m2_ds.parallel.collectives import all_gather_objects
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


# DeepSpeed cuts a pipeline's messages over tensor-parallel ranks for one fixed shape only.
PIPELINE_SETTINGS = {"pipe_partitioned": False, "grad_partitioned": False}


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
    _refuse_layout(config, mesh, stage, path)
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
    piped = mesh.pipeline.size > 1
    if piped:
        given = {**given, "pipeline": {**given.get("pipeline", {}), **PIPELINE_SETTINGS}}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation if piped or not coalesced else 1,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **given,
    }


def _refuse_layout(config: RunConfig, mesh: Mesh, stage: int, path: Path) -> None:
    """Combinations that DeepSpeed computes wrongly or does not have, with the nearest that works."""
    tensor, stages = mesh.tensor.size, mesh.pipeline.size
    if stages > 1 and stage != 1:
        raise ValueError(
            f"parallel.pipeline_parallel_size is {stages}, {path} asks for ZeRO stage {stage}: DeepSpeed's pipelines "
            f"{'clip wrongly without ZeRO' if stage == 0 else 'cannot partition gradients'}. Set engine.deepspeed to a "
            "file of stage 1 (ds_configs/zero1.json)"
        )
    if tensor > 1 and stage == 0:
        raise ValueError(
            f"parallel.tensor_parallel_size is {tensor} and {path} asks for ZeRO stage 0, at which DeepSpeed takes a "
            "wrong gradient norm. Set engine.deepspeed to a file of stage 1 (ds_configs/zero1.json): the numbers are "
            "the same, the memory is less"
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    return content


def zero_stage(settings: dict[str, Any]) -> int:
    """Of a `deepspeed_config`."""
    return int(settings["zero_optimization"]["stage"])


Opened = Callable[[nn.Parameter], AbstractContextManager[object]]


def build_model(config: RunConfig, settings: dict[str, Any], mesh: Mesh) -> tuple[nn.Module, M2Encoder]:
    """What goes into `build_engine`, and this rank's part of the model in it; its values are to be filled in.

    Under ZeRO 3 every layer is partitioned as soon as it is made: no rank ever holds the model.
    """
    kernels = choose(config.engine.apex, config.engine.fp8, mesh.device)
    layers: Layers = WholeLayers(kernels)
    if mesh.tensor.size > 1:
        from m2_ds.parallel.tensor import TensorParallelLayers

        layers = TensorParallelLayers(mesh.tensor, config.parallel.sequence_parallel, kernels.norm)
    with placed(settings, mesh):
        if mesh.pipeline.size > 1:
            from m2_ds.engine.pipeline import build_pipeline

            module, stage = build_pipeline(config, mesh, layers)
            return module, stage.model
        model = M2Encoder(config.model, layers)
    return model, model


def placed(settings: dict[str, Any], mesh: Mesh) -> AbstractContextManager[object]:
    """A context in which layers are made on this rank's device, never whole in the host's memory; partitioned under
    ZeRO 3."""
    if zero_stage(settings) < 3:
        return torch.device(mesh.device)
    unit = mesh.mpu  # by itself, Init would cut over all ranks, tensor-parallel ones included
    return cast(
        AbstractContextManager[object],
        deepspeed.zero.Init(
            data_parallel_group=None if unit is None else unit.get_data_parallel_group(),
            config_dict_or_path=settings,
            mpu=unit,
        ),
    )


def encoder_of(module: nn.Module, mesh: Mesh) -> Any:
    """What evaluation embeds with: the model itself, or its stages on the ranks of a pipeline."""
    if mesh.pipeline.size == 1:
        return module
    from m2_ds.engine.pipeline import StagedEncoder

    return StagedEncoder(module.forward_funcs[0], mesh)  # type: ignore[index, arg-type]


def opened(parameter: nn.Parameter) -> AbstractContextManager[object]:
    """A context in which a parameter's tensor is whole; what the first data-parallel rank does to it is kept."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    return cast(AbstractContextManager[object], deepspeed.zero.GatheredParameters([parameter], modifier_rank=0))


def fit_stem(model: M2Encoder, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Fit a conv stem to the first ``init_pictures`` of the stream, the same ones on every rank that has it."""
    count = config.init_pictures
    if count and model.part.is_first:
        loader = build_loader(config.data, tokenizer, global_batch=count, micro_batch=count, seed=config.seed)
        with contextlib.closing(cast(Generator[PairBatch, None, None], iter(loader))) as batches:
            stem = model.backbone.vision_embed
            with contextlib.ExitStack() as stack:
                for parameter in stem.parameters():
                    stack.enter_context(opened(parameter))
                stem.fit(next(batches).images.to(stem.cls_token.device))


def build_engine(
    model: M2Encoder, config: RunConfig, settings: dict[str, Any], mesh: Mesh, module: nn.Module | None = None
) -> Any:
    """Wrap the model: optimizer, schedule, ZeRO as ``settings`` (a `deepspeed_config`) say.

    ``module``: what `build_model` gave with it; None: the model itself.
    """
    module = model if module is None else module
    piped = mesh.pipeline.size > 1
    optimizer = build_optimizer(model, config.optim, config.engine.precision, config.loss, config.engine.apex)
    if piped and not all_gather_objects(any(p.requires_grad for p in model.parameters()), mesh.pipeline)[0]:
        raise ValueError(
            "optim.rules freeze all of a pipeline's first stage, and DeepSpeed sends gradients back to it anyway. "
            "Set parallel.pipeline_parallel_size: 1 (frozen weights need no gradients and no optimizer), or leave the "
            "first stage something to train"
        )
    here = set(module.parameters())
    for number, group in enumerate(optimizer.param_groups):  # DeepSpeed names all parameters by their module
        if group["params"][0] not in here:
            module.register_parameter(f"group_{number}_is_elsewhere", group["params"][0])
    engine, *_ = deepspeed.initialize(
        model=module if hasattr(next(model.parameters()), "ds_id") else module.to(mesh.device),
        optimizer=optimizer,
        mpu=None if piped else mesh.mpu,  # a pipeline knows its own
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
