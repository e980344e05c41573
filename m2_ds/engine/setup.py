"""From a configuration and a model to a DeepSpeed engine."""

import json
import logging
import os
import warnings
from typing import Any

import deepspeed
import torch
from torch import nn

from m2_ds.config import RunConfig
from m2_ds.engine.optim import build_optimizer, schedule_builder
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)

# What the run's own configuration decides; a DeepSpeed file that sets one of these would be silently overruled.
_OURS = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "global_batch",
    "gradient_accumulation_steps": "global_batch",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
}


def deepspeed_config(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """The DeepSpeed file completed from the run's configuration. Raises ValueError that names the file and the field."""
    path = config.engine.deepspeed
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"engine.deepspeed: no such file: {path} (paths are relative to where the job is started)"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"engine.deepspeed: {path} is not JSON: {error}") from None
    for key in _OURS.keys() & given.keys():
        raise ValueError(f"{path} sets {key!r}; set {_OURS[key]} in the recipe instead and remove it there")
    micro = config.micro_batch(mesh.data_parallel.size)
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **given,
    }


def build_engine(model: nn.Module, config: RunConfig, mesh: Mesh) -> Any:
    """Wrap the model: optimizer, schedule, ZeRO as the DeepSpeed file says."""
    settings = deepspeed_config(config, mesh)
    optimizer = build_optimizer(model, config.optim)
    engine, *_ = deepspeed.initialize(
        model=model.to(mesh.device),
        optimizer=optimizer,
        lr_scheduler=schedule_builder(config.steps, config.optim.schedule),
        config=settings,
        dist_init_required=False,
    )
    log.info(
        "ZeRO stage %d, %s, %d rank(s) on %s", engine.zero_optimization_stage(), config.engine.precision,
        mesh.world_size, mesh.device.type,
    )  # fmt: skip
    return engine


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
