"""Checkpoints of the reference release: a file of torch.save in one of its layouts, its config JSON beside it."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from m2_ds.convert.naming import Named
from m2_ds.convert.stored import Stored
from m2_ds.convert.torch_file import read_torch_file
from m2_ds.model.config import M2EncoderConfig

Layout = Literal["lightning", "deepspeed", "model", "bare"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# The reference's loader takes the first of these keys that there is; without any, the file itself.
_KEYS: dict[str, Layout] = {"state_dict": "lightning", "module": "deepspeed", "model": "model"}
_PREFIX = "_forward_module."


@dataclass(frozen=True)
class Release:
    """A checkpoint's tensors under canonical names, and what else the file holds."""

    layout: Layout
    container: str
    named: Named
    other: tuple[str, ...]
    inert: tuple[str, ...]


def open_release(path: Path, allow: Collection[str] = ()) -> Release:
    """Where a ``.ckpt`` keeps its tensors; nothing of them is read, and no code in it is run.

    ``allow``: classes whose objects the file may hold beside them (`read_torch_file`). Raises ValueError that names the
    file.
    """
    file = read_torch_file(path, allow)
    content = file.content
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    key = next((key for key in _KEYS if isinstance(content.get(key), dict)), None)
    state = content if key is None else content[key]
    found = Named()
    found.add(((str(name), x) for name, x in state.items() if isinstance(x, Stored)), str(path))
    if not found.tensors:
        raise ValueError(f"{path} holds no tensors under 'state_dict', 'module', 'model' or at its top level")
    beside = [] if key is None else [str(name) for name in content if name != key]
    beside += [str(name) for name, x in state.items() if not isinstance(x, Stored)]
    return Release(_KEYS[key] if key else "bare", file.container, found, tuple(beside), file.inert)


def read_release(path: Path) -> dict[str, Tensor]:
    """The canonical state dict in a ``.ckpt`` of any layout, memory-mapped where the container allows it.

    Prefixes are stripped and a visual tokenizer's weights dropped; nothing is resized here. Raises ValueError that
    names the file.
    """
    maps: dict[Path, torch.UntypedStorage] = {}
    return {name: tensor.mapped(maps) for name, tensor in open_release(path).named.tensors.items()}


def wrapped(layout: Layout, tensors: dict[str, Any]) -> dict[str, Any]:
    """What a file of a layout holds, from canonical names to whatever stands for a tensor."""
    if layout == "deepspeed":
        tensors = {_PREFIX + name: tensor for name, tensor in tensors.items()}
    key = next((key for key, value in _KEYS.items() if value == layout), None)
    return tensors if key is None else {key: tensors}


def find_release_config(path: Path) -> tuple[Path, M2EncoderConfig]:
    """The config JSON that belongs to a ``.ckpt``: same stem, else config.json, else the folder's only JSON file."""
    jsons = sorted(path.parent.glob("*.json"))
    for candidate in (path.with_suffix(".json"), path.parent / "config.json", *(jsons if len(jsons) == 1 else [])):
        if candidate.exists():
            return candidate, read_release_config(candidate)
    raise ValueError(
        f"no configuration for {path}: put the release's Encoder_*.json beside it as {path.with_suffix('.json').name}"
    )


def read_release_config(path: Path) -> M2EncoderConfig:
    """Raises ValueError that names the file."""
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
        return M2EncoderConfig.from_release(fields)
    except (OSError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a release configuration: {error}") from None


def release_config(config: M2EncoderConfig) -> dict[str, Any]:
    """The fields of the release's JSON for a network. Raises ValueError where its format has no word for it."""
    fields = {
        "loss_names": {"itc": 1},
        "beit_version": {1024: "large", 4096: "huge"}.get(config.hidden_size, "base"),
        "encoder_embed_dim": config.hidden_size,
        "out_embed_dim": config.embed_dim,
        "encoder_attention_heads": config.num_heads,
        "encoder_layers": config.num_layers,
        "beit3_vl_layers": config.num_vl_layers,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "max_text_len": config.max_text_length,
        "vocab_size": config.vocab_size,
        "tokenizer_type": "GLMChineseTokenizer",
        "tokenizer": "./vlmo/tokenizer",
        "precision": 32,
        "test_only": True,
        "flash_attn": True,
    }
    back = M2EncoderConfig.from_release(fields)
    shape = ("text_positions", "ffn_ratio", "stem", "logit_bias")
    if lost := [name for name in shape if getattr(back, name) != getattr(config, name)]:
        told = ", ".join(f"{name} {getattr(config, name)!r} (there {getattr(back, name)!r})" for name in lost)
        raise ValueError(f"the release's format cannot express {told}; keep this model in the canonical layout")
    return fields
