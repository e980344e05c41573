"""Checkpoints: written aside, checksummed, renamed; old ones removed. What lies in one: m2_ds.convert.run_folder.

The data position and every random decision are functions of (seed, step), so `step` is all the state they need.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import SafetensorError
from torch import Tensor, nn

from m2_ds.config import CheckpointConfig, RunConfig
from m2_ds.convert.canonical import canonical_bytes, write_config, write_weights
from m2_ds.convert.run_folder import (
    CHECKPOINTS,
    CHECKSUMS,
    ENGINE,
    MODEL,
    SETTINGS,
    STATE,
    checkpoint_name,
    checkpoint_steps,
)
from m2_ds.data.text import Tokenizer
from m2_ds.engine.resume import data_digests, layout
from m2_ds.engine.setup import low_and_master
from m2_ds.files import publish, sha256, sync, write_atomically, write_json
from m2_ds.model.weights import to_canonical
from m2_ds.parallel.collectives import all_gather_objects, all_reduce_sum, barrier, broadcast_object
from m2_ds.parallel.mesh import Mesh

ENGINE_TAG = "state"


def save(engine: Any, step: int, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> Path:
    """Write the run folder's ``checkpoints/step-00001000`` and remove what need not be kept; every rank calls it.

    Nothing of that name is visible before it is complete. Raises FloatingPointError for weights that are not finite and
    ValueError where the files cannot be written; the checkpoints from before stay as they are.
    """
    folder = config.folder / CHECKPOINTS
    _refuse_non_finite(engine.module, step, mesh)
    try:
        final = _write(engine, folder, step, config, tokenizer, mesh)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's own kind of OSError
            raise
        raise ValueError(
            f"checkpoint {checkpoint_name(step)} could not be written to {folder}: {error}. Older checkpoints are as "
            "they were. Look at free space, quota and permissions there, then start the same command again: it goes on "
            "from the newest checkpoint"
        ) from error
    if mesh.is_first:
        _prune(folder, step, config.checkpoint)
    barrier(mesh.data_parallel)
    return final


def _refuse_non_finite(module: nn.Module, step: int, mesh: Mesh) -> None:
    """A pass over this rank's weights, which costs little beside writing them."""
    own = [_own_part(parameter, mesh.data_parallel.rank) for parameter in module.parameters()]
    bad = torch.stack([(~torch.isfinite(weight)).any().to(mesh.device) for weight in own]).any().float()
    if all_reduce_sum(bad, mesh.data_parallel, "control") > 0:
        raise FloatingPointError(
            f"weights are not finite after step {step}: no checkpoint is written. Lower optim.lr or set "
            "optim.grad_clip and start the job again: it goes on from the newest checkpoint"
        )


def _own_part(parameter: Any, rank: int) -> Tensor:
    """What this rank holds of a weight; under ZeRO-3 without the padding at the end, which may hold anything."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    part = parameter.ds_tensor.detach().flatten()
    return part[: max(0, parameter.ds_numel - rank * part.numel())]


def _write(engine: Any, folder: Path, step: int, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> Path:
    final = folder / checkpoint_name(step)
    aside = folder / f".{final.name}.part"
    if mesh.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / MODEL).mkdir(parents=True)
        (aside / ENGINE).mkdir()
    barrier(mesh.data_parallel)
    engine.save_checkpoint(str(aside / ENGINE), tag=ENGINE_TAG, save_latest=False)
    _write_model(engine, aside / MODEL, config, tokenizer, mesh)
    if mesh.is_first:
        write_atomically(aside / SETTINGS, config.to_yaml().encode())
        state = {
            "step": step,
            "samples": step * config.global_batch,
            "layout": layout(mesh.data_parallel.size, int(engine.zero_optimization_stage())),
            "data": data_digests(config),
        }
        write_json(aside / STATE, state)
    barrier(mesh.data_parallel)
    names = sorted(str(p.relative_to(aside)) for p in aside.rglob("*") if p.is_file()) if mesh.is_first else []
    names = broadcast_object(names, mesh.data_parallel)
    own = {name: _seal(aside / name) for name in names[mesh.rank :: mesh.world_size]}
    parts = all_gather_objects(own, mesh.data_parallel)
    if mesh.is_first:
        write_json(aside / CHECKSUMS, dict(sorted(item for part in parts for item in part.items())))
        for path in aside.rglob("*"):
            if path.is_dir():
                sync(path)
        _remove(final)  # a damaged one of the same step, passed over when the run was resumed
        publish(aside, final)
    return final


def _seal(path: Path) -> str:
    sync(path)
    return sha256(path)


def _write_model(engine: Any, folder: Path, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> None:
    sizes = canonical_bytes(
        (
            item
            for name, shape in _shapes(engine.module)
            for item in to_canonical(name, torch.empty(shape, device="meta"))
        ),
        torch.float32,
    )
    entries = _full_entries(engine)
    if mesh.is_first:
        write_weights(folder, sizes, entries)
        write_config(folder, config.model)
        tokenizer.save(folder)
    else:  # gathering a partitioned weight takes every rank
        for _ in entries:
            pass


def _shapes(module: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    for name, parameter in module.named_parameters():
        yield name, getattr(parameter, "ds_shape", parameter.shape)


def _full_entries(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Every canonical weight in fp32, one at a time: the optimizer's master copy where a weight trains."""
    from deepspeed.runtime.zero import GatheredParameters

    masters = dict(low_and_master(engine.optimizer))
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        full = masters.get(parameter, full)
        if full is not None:
            yield from to_canonical(name, full.reshape(getattr(parameter, "ds_shape", parameter.shape)))
        elif hasattr(parameter, "ds_shape"):
            with GatheredParameters([parameter]):
                yield from to_canonical(name, parameter.data.float())
        else:
            yield from to_canonical(name, parameter.data.float())


def _prune(folder: Path, newest: int, config: CheckpointConfig) -> None:
    """Remove old checkpoints: all but the newest ``keep`` and the multiples of ``keep_every``.

    Later ones than the one just written (damaged, and passed over) do not count among the newest.
    """
    steps = sorted((step for step in checkpoint_steps(folder) if step <= newest), reverse=True)
    for step in steps[config.keep :]:
        if not (config.keep_every and step % config.keep_every == 0):
            _remove(folder / checkpoint_name(step))


def _remove(checkpoint: Path) -> None:
    """Hidden first, so that one half removed is never seen under its name."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what a job that was killed left unfinished."""
    for pattern in (".step-*.part", ".step-*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
