"""What a run starts from: weights that are read, whole and exact, into a model and the optimizer around it."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from m2_ds.config import RunConfig
from m2_ds.convert.canonical import read_stretch, read_weights
from m2_ds.convert.release import read_release
from m2_ds.convert.run_folder import MODEL
from m2_ds.convert.source import resolve
from m2_ds.engine.optimizer_state import OptimizerState
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.loading import fitted
from m2_ds.model.weights import is_adapter
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)


def given_weights(config: RunConfig, model: M2Encoder, checkpoint: Path | None) -> dict[str, Tensor] | None:
    """The canonical tensors, memory-mapped, that a run starts from or goes on from; None: fresh ones.

    They have the names and shapes of the model: vision positions are resized where init_from has another patch grid.
    Of a LoRA run that goes on, those that it adapts come from init_from. Raises ValueError that names the file.
    """
    source = config.init_from if checkpoint is None else checkpoint / MODEL
    if source is None:
        return None
    source = resolve(source)
    tensors = fitted(config.model, read(source), str(source), log.info)
    if checkpoint is not None and config.lora is not None:
        from m2_ds.engine import adapters  # peft is imported where it is asked for

        tensors |= adapters.base_weights(config, model, checkpoint)
    return tensors


def read(source: Path) -> dict[str, Tensor]:
    """The canonical tensors of a release file or a canonical folder."""
    return read_release(source) if source.is_file() else read_weights(source)


def hold_exactly(
    engine: Any, model: M2Encoder, config: RunConfig, mesh: Mesh, given: Mapping[str, Tensor], fresh: bool
) -> None:
    """In low precision, give the optimizer the numbers that were read, of which the model has rounded ones.

    Its fp32 masters start from them (``fresh``; a run that goes on restores its own), and what is frozen is written to
    checkpoints as it was read, for which each data-parallel rank holds an equal part of it in the host's memory.
    """
    if config.engine.precision == "fp32":
        return
    state = OptimizerState(engine, mesh.data_parallel)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        read = partial(read_stretch, name, parameter, given)
        if not parameter.requires_grad:
            state.keep(parameter, read)
        elif fresh:
            state.put(parameter, None, read)
