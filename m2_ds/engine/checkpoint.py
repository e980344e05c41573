"""Checkpoints: written aside, checksummed, renamed; the newest good one found again.

    checkpoints/step-00001000/
      model/        canonical weights (fp32) with config.json and the tokenizer: what `m2_ds.load` reads
      engine/       DeepSpeed's own files: optimizer, schedule, sharded weights
      state.json    step, samples seen, layout
      checksums.json   SHA-256 of every file above; written last

The data position and every random decision are functions of (seed, step), so `step` is all the state they need.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from m2_ds.config import CheckpointConfig, RunConfig
from m2_ds.convert.canonical import canonical_bytes, write_config, write_weights
from m2_ds.convert.run_folder import CHECKSUMS, ENGINE, MODEL, STATE, checkpoint_steps, newest_good
from m2_ds.data.text import Tokenizer
from m2_ds.files import publish, sha256, sync, write_json
from m2_ds.model.weights import to_canonical
from m2_ds.parallel.collectives import all_gather_objects, barrier, broadcast_object
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)


def save(engine: Any, folder: Path, step: int, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> Path:
    """Write ``folder/step-XXXXXXXX``; every rank calls it. Nothing of that name is visible before it is complete."""
    final = folder / f"step-{step:08}"
    aside = folder / f".{final.name}.part"
    if mesh.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / MODEL).mkdir(parents=True)
        (aside / ENGINE).mkdir()
    barrier(mesh.data_parallel)
    engine.save_checkpoint(str(aside / ENGINE), tag="state", save_latest=False)
    _save_model(engine.module, aside / MODEL, config, tokenizer, mesh)
    if mesh.is_first:
        layout = {"data_parallel": mesh.data_parallel.size, "zero_stage": engine.zero_optimization_stage()}
        samples = step * config.global_batch
        write_json(aside / STATE, {"step": step, "samples": samples, "seed": config.seed, "layout": layout})
    barrier(mesh.data_parallel)
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    own = {str(p.relative_to(aside)): _seal(p) for p in files[mesh.rank :: mesh.world_size]}
    parts = all_gather_objects(own, mesh.data_parallel)
    if mesh.is_first:
        write_json(aside / CHECKSUMS, {name: digest for part in parts for name, digest in sorted(part.items())})
        for path in aside.rglob("*"):
            if path.is_dir():
                sync(path)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step, passed over when resuming
        publish(aside, final)
        _prune(folder, config.checkpoint)
    barrier(mesh.data_parallel)
    return final


def _seal(path: Path) -> str:
    sync(path)
    return sha256(path)


def _save_model(module: nn.Module, folder: Path, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> None:
    sizes = canonical_bytes(
        (item for name, shape in _shapes(module) for item in to_canonical(name, torch.empty(shape, device="meta"))),
        torch.float32,
    )
    entries = _full_entries(module)
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


def _full_entries(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every canonical weight in fp32, one at a time: the optimizer's master copy where a weight trains."""
    from deepspeed.runtime.zero import GatheredParameters

    for name, parameter in module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if full is not None:
            yield from to_canonical(name, full.reshape(getattr(parameter, "ds_shape", parameter.shape)))
        elif hasattr(parameter, "ds_shape"):
            with GatheredParameters([parameter]):
                yield from to_canonical(name, parameter.data.float())
        else:
            yield from to_canonical(name, parameter.data.float())


def _prune(folder: Path, config: CheckpointConfig) -> None:
    """Remove old checkpoints: all but the newest ``keep`` and the multiples of ``keep_every``."""
    steps = sorted(checkpoint_steps(folder), reverse=True)
    for step in steps[config.keep :]:
        if not (config.keep_every and step % config.keep_every == 0):
            shutil.rmtree(folder / f"step-{step:08}")


def find(folder: Path, mesh: Mesh) -> Path | None:
    """`newest_good`, decided by the first rank for all."""
    found = newest_good(folder) if mesh.is_first else None
    return broadcast_object(found, mesh.data_parallel)


def restore(engine: Any, checkpoint: Path, config: RunConfig, mesh: Mesh) -> int:
    """Load engine state from a checkpoint of the same layout; returns the step to go on with."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    layout = {"data_parallel": mesh.data_parallel.size, "zero_stage": engine.zero_optimization_stage()}
    if state["layout"] != layout:
        raise ValueError(
            f"{checkpoint} was written under {state['layout']}, this job runs {layout}. Start it with the same number of "
            f"ranks and ZeRO stage, or start a new run folder with init_from={checkpoint / MODEL}"
        )
    if state["seed"] != config.seed or state["samples"] != state["step"] * config.global_batch:
        raise ValueError(
            f"{checkpoint} belongs to seed {state['seed']} and global_batch {state['samples'] // max(state['step'], 1)}; "
            f"this job has {config.seed} and {config.global_batch}: the data stream would not go on where it stopped"
        )
    path, _ = engine.load_checkpoint(str(checkpoint / ENGINE), tag="state")
    if path is None:
        raise ValueError(f"DeepSpeed found no state in {checkpoint / ENGINE}")
    return int(state["step"])
