"""LoRA adapters in a run: put beside the layers of its model, written into its checkpoints, read back.

Merged and unmerged, a weight would not be what it was. So a checkpoint's model/ has the merged weights, for whoever
uses the model, and a run that goes on reads those that it adapts where it read them first: from init_from, whose
numbers must have the digest noted in adapter/.
"""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from m2_ds.config import RunConfig
from m2_ds.convert.run_folder import ADAPTER, MODEL
from m2_ds.convert.source import resolve
from m2_ds.engine.setup import opened, placed
from m2_ds.engine.snapshot import States
from m2_ds.engine.start import read
from m2_ds.files import write_json
from m2_ds.model import lora
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import adapter_of, canonical_names, fill, has_adapters, is_adapter, pieces
from m2_ds.parallel.collectives import all_gather_objects
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)


def base_weights(config: RunConfig, model: M2Encoder, checkpoint: Path) -> dict[str, Tensor]:
    """The weights that a run which goes on from ``checkpoint`` adapts, as `config.init_from` has them.

    ``model``: with its adapters (the run goes back) or still without them (the job starts).
    Raises ValueError where they are not there; whether they are the same ones is for `add` to find out.
    """
    assert config.lora is not None and config.init_from is not None
    if has_adapters(model):
        weights = [name for name, _ in model.named_parameters() if adapter_of(model, name) is not None]
        names = [canonical for name in weights for canonical in canonical_names(name)]
    else:
        names = lora.adapted_weights(lora.adaptable(model, config.lora.pattern))
    try:
        tensors = read(resolve(config.init_from))
        return {name: tensors[name] for name in names}
    except (ValueError, KeyError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{config.init_from} holds no {error}"
        raise ValueError(
            f"{reason}. {checkpoint} is of a LoRA run and needs the weights that it adapts. {_remedy(checkpoint)}"
        ) from None


def add(
    model: M2Encoder,
    config: RunConfig,
    settings: dict[str, Any],
    mesh: Mesh,
    given: Mapping[str, Tensor],
    checkpoint: Path | None,
) -> None:
    """Adapt a model that holds its weights, ``given`` under canonical names; with the adapters of a ``checkpoint``.

    ``settings``: a `deepspeed_config`. Raises ValueError where those were trained on other weights.
    """
    assert config.lora is not None and config.init_from is not None
    layers = lora.adaptable(model, config.lora.pattern)
    names = lora.adapted_weights(layers)
    own = {name: lora.tensor_digest(given[name]) for name in names[mesh.rank :: mesh.world_size]}
    digest = lora.digest_of({k: v for some in all_gather_objects(own, mesh.world) for k, v in some.items()})
    if checkpoint is not None:
        before = lora.read_settings(checkpoint / ADAPTER)
        if before["revision"] != digest:
            raise ValueError(
                f"init_from {config.init_from} does not hold the weights that {checkpoint} adapts: those were read "
                f"from {before['base_model_name_or_path']} and have the digest {before['revision']}, these {digest}. "
                f"{_remedy(checkpoint)}"
            )
    with placed(settings, mesh):
        lora.add_adapters(model, config.lora, layers, str(resolve(config.init_from)), digest)
    if checkpoint is None:
        lora.draw_adapters(model, config.seed, opened)
    else:
        saved = lora.read_adapters(checkpoint / ADAPTER)
        fill(model, lambda piece: saved[piece.name], opened, adapters=True)
    count = sum(getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters() if is_adapter(name))
    log.info("LoRA: %d layers adapted at rank %d by %d numbers", len(layers), config.lora.rank, count)


def _remedy(checkpoint: Path) -> str:
    return (
        "Set init_from to where they are now; or start a new run folder (folder=...) with "
        f"init_from={checkpoint / MODEL}, which has the adapters merged, and adapt that"
    )


def write(
    folder: Path, model: M2Encoder, state: States, mesh: Mesh, guard: AbstractContextManager[object] | None = None
) -> None:
    """Write a checkpoint's adapter/. Every rank calls it; the first one gathers and writes, inside ``guard``."""
    factors: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not (is_adapter(name) or parameter.requires_grad):
            continue
        found = others if not is_adapter(name) else factors
        for piece in pieces(name, parameter, state.full(parameter, None)):
            if mesh.is_first:
                found[piece.name] = piece.tensor.cpu().contiguous().clone()
    if not mesh.is_first:
        return
    with nullcontext() if guard is None else guard:
        folder.mkdir()
        write_json(folder / lora.CONFIG, lora.settings_of(model))
        named = {lora.PREFIX + name: tensor for name, tensor in factors.items()}
        save_file(named, folder / lora.ADAPTERS, metadata={"format": "pt"})
        if others:
            save_file(others, folder / lora.TRAINED, metadata={"format": "pt"})
