"""Reading checkpoints of the reference release: a pickle in one of its layouts, its config JSON beside it."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2_ds.model.config import M2EncoderConfig

_PREFIX = "_forward_module."


def read_release(path: Path) -> dict[str, Tensor]:
    """The canonical state dict in a ``.ckpt``: Lightning (``state_dict``), DeepSpeed (``module``), ``model`` or bare.

    Prefixes are stripped and a visual tokenizer's weights dropped; nothing is resized here. Only tensors and plain
    containers are unpickled. Raises ValueError that names the file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"no such checkpoint: {path}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds objects other than tensors, which would run code when loaded, or is damaged "
            f"({str(error).splitlines()[0]})"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is no torch checkpoint, or is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    for key in ("state_dict", "module", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {
        str(name).removeprefix(_PREFIX): tensor
        for name, tensor in content.items()
        if isinstance(tensor, Tensor) and "visual_tokenizer" not in str(name)
    }
    if not state:
        raise ValueError(f"{path} holds no tensors under 'state_dict', 'module', 'model' or at its top level")
    return state


def find_release_config(path: Path) -> tuple[Path, M2EncoderConfig]:
    """The config JSON that belongs to a ``.ckpt``: same stem, else config.json, else the folder's only JSON file."""
    jsons = sorted(path.parent.glob("*.json"))
    for candidate in (path.with_suffix(".json"), path.parent / "config.json", *(jsons if len(jsons) == 1 else [])):
        if candidate.exists():
            try:
                fields: Any = json.loads(candidate.read_text(encoding="utf-8"))
                return candidate, M2EncoderConfig.from_release(fields)
            except (json.JSONDecodeError, AttributeError, ValueError) as error:
                raise ValueError(f"{candidate} is not a release configuration: {error}") from None
    raise ValueError(
        f"no configuration for {path}: put the release's Encoder_*.json beside it as {path.with_suffix('.json').name}"
    )
