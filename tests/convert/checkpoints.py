"""Checkpoints to convert: of a small network with random numbers, as files of the release and of others."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2_ds.convert.command import convert
from m2_ds.convert.release import release_config
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import canonical_shapes

# As small as the release's format allows: its text position table has 1024 rows.
CONFIG = M2EncoderConfig.preset("test", num_layers=1, text_positions=1024, max_text_length=52)
LAYOUTS = {"lightning": "state_dict", "deepspeed": "module", "model": "model", "bare": None}


def random_state(
    config: M2EncoderConfig = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Any finite bits of the type would do; these are normal numbers, in the order of the network's names."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in canonical_shapes(config).items()}


def as_layout(state: dict[str, Any], layout: str) -> dict[str, Any]:
    if layout == "deepspeed":
        state = {f"_forward_module.{name}": tensor for name, tensor in state.items()}
    if layout == "prefixed":
        return {f"_forward_module.module.{name}": tensor for name, tensor in state.items()}
    key = LAYOUTS[layout]
    return state if key is None else {key: state, "epoch": 3, "global_step": 7}


def write(folder: Path, content: Any, config: M2EncoderConfig = CONFIG, legacy: bool = False) -> Path:
    """``m2.ckpt`` with its JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "m2.ckpt", _use_new_zipfile_serialization=not legacy)
    (folder / "m2.json").write_text(json.dumps(release_config(config)))
    return folder / "m2.ckpt"


def converted(source: Path, out: Path, **options: Any) -> Path:
    convert(source, out, **options)
    return out


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        assert torch.equal(found[name].contiguous().view(ints), tensor.contiguous().view(ints)), name


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
