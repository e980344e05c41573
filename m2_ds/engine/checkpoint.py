"""Checkpoints: written aside, checksummed, renamed; old ones removed. What lies in one: m2_ds.convert.run_folder.

The data position and every random decision are functions of the seed and the number of pairs that the run has seen.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
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
from m2_ds.engine.snapshot import States
from m2_ds.files import publish, sha256, sync, write_atomically, write_json
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import adapter_of, has_adapters, is_adapter, merged, pieces
from m2_ds.parallel.collectives import all_gather_objects, all_reduce_sum, barrier, broadcast_object
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)


class Unwritten(Exception):
    """Raised on every rank where one of them could not write; the checkpoints from before are as they were."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint is made of. ``about``: its state.json, on the first rank."""

    model: M2Encoder
    state: States
    step: int
    config: RunConfig
    tokenizer: Tokenizer
    about: dict[str, Any] | None

    @staticmethod
    def now(
        engine: Any,
        model: M2Encoder,
        step: int,
        config: RunConfig,
        tokenizer: Tokenizer,
        mesh: Mesh,
        stream: dict[str, Any] | None,
        state: States | None = None,
    ) -> "Content":
        """As the engine stands, around this rank's part ``model``. ``stream``: `PairDataset.state`, on the first rank.

        ``state``: where the numbers are read, by default the optimizer itself.
        """
        about = None
        if mesh.is_first:
            assert stream is not None
            about = {
                "step": step,
                "samples": stream["samples"],
                "updates": engine.global_steps - engine.skipped_steps,
                "layout": layout(mesh, int(engine.zero_optimization_stage())),
                "data": [source["manifest"] for source in stream["sources"]],
                "stream": stream,
            }
        state = OptimizerState(engine, mesh.data_parallel) if state is None else state
        return Content(model, state, step, config, tokenizer, about)


def write(content: Content, mesh: Mesh) -> Path:
    """Write the run folder's ``checkpoints/step-00001000`` and remove what need not be kept; every rank calls it.

    Of collectives it uses those of the ``mesh`` that is given. Nothing of that name is visible before it is complete.
    Raises `Unwritten`, on every rank, where files cannot be written. Weights are looked at by `refuse_non_finite`.
    """
    final = _write(content, mesh)
    if mesh.is_first:
        try:
            _prune(final.parent, content.step, content.config.checkpoint)
        except OSError as error:
            log.warning("old checkpoints could not be removed: %s", error)
    barrier(mesh.world)
    return final


def refuse_non_finite(model: nn.Module, step: int, mesh: Mesh) -> None:
    """A pass over this rank's weights, which costs little beside writing them."""
    own = [_own_part(parameter, mesh.data_parallel.rank) for parameter in model.parameters()]
    agree_finite(bool(torch.stack([torch.isfinite(weight).all() for weight in own]).all()), step, mesh)


def agree_finite(finite: bool, step: int, mesh: Mesh) -> None:
    """Raises FloatingPointError on every rank of the ``mesh`` where one of them has weights that are not finite."""
    bad = torch.tensor(float(not finite), device=mesh.device)
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


class _Attempt:
    """A context that keeps this rank's first error of writing, so that collectives go on until all ranks know it."""

    def __init__(self, mesh: Mesh, folder: Path) -> None:
        self.mesh, self.folder = mesh, folder
        self.error: str | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, OSError | SafetensorError):
            return False
        self.error = self.error or str(error)
        return True

    def agree(self) -> None:
        """Raises `Unwritten` on all ranks where one of them has met with an error."""
        errors = all_gather_objects(self.error, self.mesh.world)
        failed = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
        if failed:
            if self.mesh.is_first:
                shutil.rmtree(self.folder, ignore_errors=True)  # the next one needs the room
            raise Unwritten(failed[0])


def _write(content: Content, mesh: Mesh) -> Path:
    folder = content.config.folder / CHECKPOINTS
    final = folder / checkpoint_name(content.step)
    aside = folder / f".{final.name}.part"
    parts = content.state.folders(aside)
    attempt = _Attempt(mesh, aside)
    if mesh.is_first:
        with attempt:
            shutil.rmtree(aside, ignore_errors=True)
            for part in parts.values():
                part.mkdir(parents=True)
    attempt.agree()
    writer = WeightWriter(mesh, guard=attempt)
    for name, part in parts.items():
        _write_part(writer, part, content.model, content.state, name)
    writer.finish()
    if has_adapters(content.model):
        from m2_ds.engine import adapters  # peft is imported where it is asked for

        adapters.write(aside / ADAPTER, content.model, content.state, mesh, attempt)
    if mesh.is_first:
        with attempt:
            write_config(aside / MODEL, content.config.model)
            content.tokenizer.save(aside / MODEL)
            write_atomically(aside / SETTINGS, content.config.to_yaml().encode())
            write_json(aside / STATE, content.about)
    attempt.agree()
    names = sorted(str(p.relative_to(aside)) for p in aside.rglob("*") if p.is_file()) if mesh.is_first else []
    names = broadcast_object(names, mesh.world)
    own: dict[str, str] = {}
    with attempt:
        own = {name: _seal(aside / name) for name in names[mesh.rank :: mesh.world_size]}
    attempt.agree()
    digests = all_gather_objects(own, mesh.world)
    if mesh.is_first:
        with attempt:
            write_json(aside / CHECKSUMS, dict(sorted(item for some in digests for item in some.items())))
            for path in aside.rglob("*"):
                if path.is_dir():
                    sync(path)
            _remove(final)  # a damaged one of the same step, passed over when the run was resumed
            publish(aside, final)
    attempt.agree()
    return final


def _write_part(writer: WeightWriter, folder: Path, model: M2Encoder, state: States, name: str | None) -> None:
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
