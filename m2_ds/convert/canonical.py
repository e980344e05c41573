"""The canonical folder: unsharded safetensors under the release's names, config.json, tokenizer files beside them.

model.safetensors                        or  model-00001-of-00004.safetensors ... + model.safetensors.index.json
config.json                              fields of M2EncoderConfig
tokenizer_config.json, tokenizer.model   where the run had a tokenizer
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m2_ds.files import sync, write_json
from m2_ds.model.config import M2EncoderConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"


def write_weights(
    folder: Path, sizes: Mapping[str, int], tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = 2 << 30
) -> None:
    """Write named tensors as safetensors shards, holding one shard in memory at a time.

    ``sizes``: bytes of every tensor, in the order in which ``tensors`` yields them. Files are synced to disk; making
    the folder appear atomically is the caller's part.
    """
    shards = _plan(sizes, max_shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    stream = iter(tensors)
    for file, members in zip(names, shards):
        held = {}
        for expected in members:
            name, tensor = next(stream)
            assert name == expected, f"{name} came where {expected} was announced"
            held[name] = tensor.detach().cpu().contiguous().clone()
        save_file(held, folder / file, metadata={"format": "pt"})
        sync(folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, members in zip(names, shards) for name in members}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _plan(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_config(folder: Path, config: M2EncoderConfig) -> None:
    write_json(folder / CONFIG, {"model_type": "m2_encoder", **config.model_dump(mode="json")})


def read_config(folder: Path) -> M2EncoderConfig:
    """Raises ValueError that names the file."""
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields.pop("model_type", None)
        return M2EncoderConfig.model_validate(fields)
    except (OSError, json.JSONDecodeError, ValidationError) as error:
        raise ValueError(f"{path} does not hold a model configuration: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a canonical folder. Raises ValueError where there are none or one is missing."""
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.exists():
            raise ValueError(f"{folder} holds no {file.name}: not a canonical weight folder, or an incomplete copy")
    return files


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors, memory-mapped. Raises ValueError that names a file which cannot be read."""
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                state.update((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None
    return state


def canonical_bytes(entries: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each canonical entry when written in ``dtype``; meta tensors will do."""
    return {name: tensor.numel() * dtype.itemsize for name, tensor in entries}
