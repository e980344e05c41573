"""Going on from a checkpoint: which one, whether this job can, and loading it so that the break does not show."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import yaml

from m2_ds.config import RunConfig
from m2_ds.convert.run_folder import CHECKPOINTS, ENGINE, MODEL, SETTINGS, STATE, checkpoint_steps, newest_good
from m2_ds.data.text import Tokenizer, load_tokenizer
from m2_ds.engine.optim import lr_scale
from m2_ds.files import sha256
from m2_ds.parallel.collectives import broadcast_object
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)

# What a run cannot change on its way: the position in the stream, weights or optimizer state would not fit.
_FIXED = re.compile(
    r"seed|global_batch|engine\.precision|optim\.(kind|rules(\..*)?)|loss\.(unimodal|vl)_weight"
    r"|model\.(?!drop_path|patch_drop|recompute|position_std)\w+"
)
# What has no effect on the numbers.
_FREE = re.compile(
    r"folder|init_from|init_pictures|tokenizer|micro_batch|model\.(recompute|position_std)"
    r"|(engine|checkpoint|log|evaluation)(\..*)?"
    r"|data\.(workers|prefetch|row_group_cache_mb|picture_cache_mb|sources\.\d+\.path)"
)
_HYPERPARAMETERS = ("initial_lr", "betas", "eps", "weight_decay", "ceiling", "momentum")


def layout(data_parallel: int, zero_stage: int) -> dict[str, int]:
    """What decides how DeepSpeed's files are cut."""
    return {"data_parallel": data_parallel, "zero_stage": zero_stage}


def data_digests(config: RunConfig) -> list[str]:
    """SHA-256 of each source's manifest, which holds the checksums of its shards."""
    return [sha256(source.path / "manifest.json") for source in config.data.sources]


def find(config: RunConfig, mesh: Mesh) -> Path | None:
    """The newest good checkpoint of the run folder, or None for a run that has none yet; decided by the first rank.

    Raises ValueError where there are checkpoints and none is whole: starting over would overwrite what is left of them.
    """
    folder = config.folder / CHECKPOINTS
    found = newest_good(folder) if mesh.is_first else None
    there = len(checkpoint_steps(folder)) if mesh.is_first else 0
    found, there = broadcast_object((found, there), mesh.data_parallel)
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
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        before = _flat(yaml.safe_load((checkpoint / SETTINGS).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ValueError(
            f"{checkpoint} holds no {Path(error.filename).name}, so another version of m2_ds wrote it. Start a new run "
            f"folder (folder=...) with init_from={checkpoint / MODEL}"
        ) from None
    if state["layout"] != now:
        raise ValueError(
            f"{checkpoint} was written under {_words(state['layout'])}, this job runs {_words(now)}. Start it with the "
            f"same number of ranks and ZeRO stage, or start a new run folder with init_from={checkpoint / MODEL}"
        )
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
    noted = [told[name] for name in differing if not _FREE.fullmatch(name)]
    if state["data"] != data_digests(config):
        noted.append("the content of a data source is another one")
    for note in noted:
        log.warning("going on with a change: %s", note)
    return int(state["step"])


def restore(engine: Any, checkpoint: Path, config: RunConfig) -> None:
    """Load weights, optimizer and schedule. Learning rates and the like are those of ``config``, not the saved ones."""
    groups = engine.optimizer.param_groups
    fresh = [{name: group[name] for name in _HYPERPARAMETERS if name in group} for group in groups]
    path, _ = engine.load_checkpoint(str(checkpoint / ENGINE), tag="state")
    if path is None:
        raise ValueError(f"DeepSpeed found no state in {checkpoint / ENGINE}")
    scheduler = engine.lr_scheduler
    scheduler.base_lrs = [values["initial_lr"] for values in fresh]
    factor = lr_scale(scheduler.last_epoch, config.steps, config.optim.schedule)
    for group, values in zip(engine.optimizer.param_groups, fresh):
        group.update(values, lr=values["initial_lr"] * factor)


def _words(found: dict[str, int]) -> str:
    return f"{found['data_parallel']} rank(s) at ZeRO stage {found['zero_stage']}"


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all values in a tree; an empty list or mapping counts as a value."""
    if not isinstance(node, dict | list) or not node:
        return {prefix: node}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {
        name: x for key, child in items for name, x in _flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }
