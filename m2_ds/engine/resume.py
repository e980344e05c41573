"""Going on from a checkpoint: which one, whether this job can, and loading it so that the break does not show.

The layout need not be the one that wrote it: every rank reads its slices of the same files.
"""

import json
import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from m2_ds.config import RunConfig
from m2_ds.convert.canonical import read_stretch, read_weights
from m2_ds.convert.run_folder import (
    ADAPTER,
    CHECKPOINTS,
    MODEL,
    OPTIMIZER,
    SETTINGS,
    STATE,
    checkpoint_steps,
    newest_good,
)
from m2_ds.data.reader import open_dataset
from m2_ds.data.text import Tokenizer, load_tokenizer
from m2_ds.engine.optim import lr_scale
from m2_ds.engine.optimizer_state import OptimizerState
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import has_adapters
from m2_ds.parallel.collectives import broadcast_object
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)

# What a run cannot change on its way: the position in the stream, weights or optimizer state would not fit.
_FIXED = re.compile(
    r"seed|lora(\..*)?|engine\.precision|optim\.(kind|rules(\..*)?)|loss\.(unimodal|vl)_weight"
    r"|model\.(?!drop_path|patch_drop|recompute|(patch_)?position_std)\w+"
)
# What has no effect on the numbers but for rounding.
_FREE = re.compile(
    r"folder|init_from|init_pictures|tokenizer|micro_batch|model\.(recompute|(patch_)?position_std)"
    r"|(engine|checkpoint|anomalies|log|evaluation)(\..*)?|parallel\.(?!contrast_group).*"
    r"|data\.(workers|prefetch|row_group_cache_mb|picture_cache_mb|cache_folder|cache_gb|read_ahead|sort_by_length)"
    r"|data\.sources\.\d+\.path"
)


def layout(mesh: Mesh, zero_stage: int) -> dict[str, int]:
    """What a checkpoint tells of the job that wrote it. Only the number of contrast groups changes what is computed."""
    return {
        "tensor_parallel": mesh.tensor.size,
        "data_parallel": mesh.data_parallel.size,
        "pipeline_parallel": mesh.pipeline.size,
        "zero_stage": zero_stage,
        "contrast_groups": mesh.contrast_groups,
    }


def step(checkpoint: Path) -> int:
    """Steps that were done by a checkpoint."""
    return int(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["step"])


def samples(checkpoint: Path) -> int:
    """Pairs that the run has seen by a checkpoint: the stream goes on with the next."""
    return int(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["samples"])


def _check_data(checkpoint: Path, state: dict[str, Any], config: RunConfig) -> None:
    """Refuse other data than the run has read so far: of it, the number of pairs seen does not say what is left."""
    now = [open_dataset(source.path).digest for source in config.data.sources]
    if state["data"] == now:
        return
    different = [
        f"data.sources.{number} ({source.path})"
        for number, source in enumerate(config.data.sources)
        if number >= len(state["data"]) or state["data"][number] != now[number]
    ]
    raise ValueError(
        f"{checkpoint} was trained on other data: {', '.join(different) or 'fewer sources are given'}: the manifest is "
        "not the one that was read. Put the data sets back as they were (data.sources.N.path may be another place), "
        f"or start a new run folder (folder=...) with init_from={checkpoint / MODEL}"
    )


def find(config: RunConfig, mesh: Mesh) -> Path | None:
    """The newest good checkpoint of the run folder, or None for a run that has none yet; decided by the first rank.

    Raises ValueError where there are checkpoints and none is whole: starting over would overwrite what is left of them.
    """
    folder = config.folder / CHECKPOINTS
    found = newest_good(folder) if mesh.is_first else None
    there = len(checkpoint_steps(folder)) if mesh.is_first else 0
    found, there = broadcast_object((found, there), mesh.world)
    if found is None and there:
        raise ValueError(
            f"{folder} holds {there} checkpoint(s) and none of them is whole (the log above says why), so the run "
            "cannot go on and will not start over on top of them. Bring one back from a copy; or start a new run "
            f"(folder=...), with init_from=CHECKPOINT/{MODEL} if that part is good; or move {folder} away to begin "
            "again"
        )
    return found


def check(checkpoint: Path, config: RunConfig, tokenizer: Tokenizer, now: dict[str, int]) -> int:
    """Whether this job may go on from a checkpoint; returns its step.

    ``now``: this job's `layout`. Raises ValueError that names what differs and what to do instead. Changes that only
    make the rest of the run another one than it would have been are allowed, and told.
    """
    for name in (SETTINGS, STATE, OPTIMIZER):
        if not (checkpoint / name).exists():
            raise ValueError(
                f"{checkpoint} holds no {name}, so another version of m2_ds wrote it. Start a new run folder "
                f"(folder=...) with init_from={checkpoint / MODEL}"
            )
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    before = _flat(yaml.safe_load((checkpoint / SETTINGS).read_text(encoding="utf-8")))
    after = _flat(config.model_dump(mode="json"))
    differing = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    told = {name: f"{name} was {before.get(name)!r}, is now {after.get(name)!r}" for name in differing}
    if fixed := [told[name] for name in differing if _FIXED.fullmatch(name)]:
        raise ValueError(
            f"{checkpoint} cannot be gone on from with other settings: {'; '.join(fixed)}. Set them as they were, or "
            f"start a new run folder (folder=...) with init_from={checkpoint / MODEL}"
        )
    saved = load_tokenizer(checkpoint / MODEL)
    if saved.__getstate__() != tokenizer.__getstate__():
        raise ValueError(
            f"{config.tokenizer} is not the tokenizer that {checkpoint} was trained with. "
            f"Set tokenizer={checkpoint / MODEL}, or start a new run folder (folder=...)"
        )
    _check_data(checkpoint, state, config)
    noted = [told[name] for name in differing if not _FREE.fullmatch(name)]
    if (groups := state["layout"]["contrast_groups"]) != now["contrast_groups"]:
        noted.append(f"pairs were compared in {groups} contrast group(s), are now in {now['contrast_groups']}")
    if state["layout"] != now:
        log.info("going on in another layout: was %s, is now %s", _words(state["layout"]), _words(now))
    for note in noted:
        log.warning("going on with a change: %s", note)
    return int(state["step"])


def restore(engine: Any, model: M2Encoder, checkpoint: Path, config: RunConfig, mesh: Mesh) -> None:
    """Bring an engine, around a ``model`` that holds the checkpoint's weights, to where the checkpoint stands.

    Set are the fp32 copies of the weights (in low precision the model holds them rounded), the optimizer's state, the
    schedule and DeepSpeed's counters. Learning rates and the like stay those of ``config``, not the saved ones.
    """
    about = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    step, updates = about["step"], about["updates"]
    state = OptimizerState(engine, mesh.data_parallel)
    state.begin(updates)
    for name, part in state.folders(checkpoint).items():
        tensors = read_weights(part)
        if name is None and has_adapters(model):
            from m2_ds.model.lora import read_adapters  # peft is imported where it is asked for

            tensors |= read_adapters(checkpoint / ADAPTER)
        for inner, parameter in model.named_parameters():
            if parameter.requires_grad and state.has(parameter, name):
                state.put(parameter, name, partial(read_stretch, inner, parameter, tensors))
    scheduler = engine.lr_scheduler
    scheduler.last_epoch, scheduler._step_count = updates, updates + 1
    factor = lr_scale(updates, config.steps, config.optim.schedule)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    scheduler._last_lr = [group["lr"] for group in engine.optimizer.param_groups]
    engine.global_steps, engine.skipped_steps = step, step - updates
    engine.global_samples = about["samples"]
    engine.micro_steps = step * engine.gradient_accumulation_steps()


def _words(found: dict[str, int]) -> str:
    sizes = " x ".join(f"{found[f'{axis}_parallel']} {axis}" for axis in ("tensor", "data", "pipeline"))
    return f"{sizes}-parallel rank(s) at ZeRO stage {found['zero_stage']}"


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all values in a tree; an empty list or mapping counts as a value."""
    if not isinstance(node, dict | list) or not node:
        return {prefix: node}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {
        name: x for key, child in items for name, x in _flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }
