"""Checkpoints: written aside, checksummed, renamed; old ones removed. What lies in one: m2_ds.convert.run_folder.

The data position and every random decision are functions of the seed and the number of pairs that the run has seen.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from m2_ds.config import CheckpointConfig, RunConfig
from m2_ds.convert.canonical import WeightWriter, outlines, write_config
from m2_ds.convert.run_folder import (
    ADAPTER,
    CHECKPOINTS,
    CHECKSUMS,
    MODEL,
    SETTINGS,
    STATE,
    checkpoint_name,
    checkpoint_steps,
)
from m2_ds.data.text import Tokenizer
from m2_ds.engine.optimizer_state import OptimizerState
from m2_ds.engine.resume import layout
from m2_ds.files import publish, sha256, sync, write_atomically, write_json
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import adapter_of, has_adapters, is_adapter, merged, pieces
from m2_ds.parallel.collectives import all_gather_objects, all_reduce_sum, barrier, broadcast_object
from m2_ds.parallel.mesh import Mesh


def save(
    engine: Any,
    model: M2Encoder,
    step: int,
    config: RunConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    stream: dict[str, Any] | None,
) -> Path:
    """Write the run folder's ``checkpoints/step-00001000`` and remove what need not be kept; every rank calls it.

    ``model``: this rank's part of it, inside the engine. ``stream``: where the data stands (`PairDataset.state`), on
    the first rank. Nothing of that name is visible before it is complete. Raises FloatingPointError for weights that
    are not finite and ValueError where the files cannot be written; the checkpoints from before stay as they are.
    """
    folder = config.folder / CHECKPOINTS
    _refuse_non_finite(model, step, mesh)
    try:
        final = _write(engine, model, folder, step, config, tokenizer, mesh, stream)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {checkpoint_name(step)} could not be written to {folder}: {error}. Older checkpoints are as "
            "they were. Look at free space, quota and permissions there, then start the same command again: it goes on "
            "from the newest checkpoint"
        ) from error
    if mesh.is_first:
        _prune(folder, step, config.checkpoint)
    barrier(mesh.world)
    return final


def _refuse_non_finite(model: nn.Module, step: int, mesh: Mesh) -> None:
    """A pass over this rank's weights, which costs little beside writing them."""
    own = [_own_part(parameter, mesh.data_parallel.rank) for parameter in model.parameters()]
    bad = torch.stack([(~torch.isfinite(weight)).any().to(mesh.device) for weight in own]).any().float()
    if all_reduce_sum(bad, mesh.world, "control") > 0:
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


def _write(
    engine: Any,
    model: M2Encoder,
    folder: Path,
    step: int,
    config: RunConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    stream: dict[str, Any] | None,
) -> Path:
    final = folder / checkpoint_name(step)
    aside = folder / f".{final.name}.part"
    state = OptimizerState(engine, mesh.data_parallel)
    parts = state.folders(aside)
    if mesh.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        for part in parts.values():
            part.mkdir(parents=True)
    barrier(mesh.world)
    writer = WeightWriter(mesh)
    for name, part in parts.items():
        _write_part(writer, part, model, state, name)
    writer.finish()
    if has_adapters(model):
        from m2_ds.engine import adapters  # peft is imported where it is asked for

        adapters.write(aside / ADAPTER, model, state, mesh)
    if mesh.is_first:
        assert stream is not None
        write_config(aside / MODEL, config.model)
        tokenizer.save(aside / MODEL)
        write_atomically(aside / SETTINGS, config.to_yaml().encode())
        about = {
            "step": step,
            "samples": stream["samples"],
            "updates": engine.global_steps - engine.skipped_steps,
            "layout": layout(mesh, state.stage),
            "data": [source["manifest"] for source in stream["sources"]],
            "stream": stream,
        }
        write_json(aside / STATE, about)
    barrier(mesh.world)
    names = sorted(str(p.relative_to(aside)) for p in aside.rglob("*") if p.is_file()) if mesh.is_first else []
    names = broadcast_object(names, mesh.world)
    own = {name: _seal(aside / name) for name in names[mesh.rank :: mesh.world_size]}
    digests = all_gather_objects(own, mesh.world)
    if mesh.is_first:
        write_json(aside / CHECKSUMS, dict(sorted(item for some in digests for item in some.items())))
        for path in aside.rglob("*"):
            if path.is_dir():
                sync(path)
        _remove(final)  # a damaged one of the same step, passed over when the run was resumed
        publish(aside, final)
    return final


def _write_part(writer: WeightWriter, folder: Path, model: M2Encoder, state: OptimizerState, name: str | None) -> None:
    """All weights, or one kind of state of those that have it; what is partitioned is gathered one after another.

    Adapters are merged into the weights, and have states of their own.
    """

    def whole(inner: str, parameter: nn.Parameter) -> Tensor:
        value = state.full(parameter, name)
        if name is not None or (adapter := adapter_of(model, inner)) is None:
            return value
        a, b, scaling = adapter
        return merged(value, state.full(a, None), state.full(b, None), scaling)

    members = [
        (inner, parameter)
        for inner, parameter in model.named_parameters()
        if state.has(parameter, name) and not (name is None and is_adapter(inner))
    ]
    announced = [piece for inner, parameter in members for piece in outlines(inner, parameter)]
    entries = (piece for inner, parameter in members for piece in pieces(inner, parameter, whole(inner, parameter)))
    writer.write(folder, announced, entries)


def _seal(path: Path) -> str:
    sync(path)
    return sha256(path)


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
