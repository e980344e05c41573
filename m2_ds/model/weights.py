"""Names, initial values and loading of weights.

The state dict speaks the release's names. Inside, q, k, v of a branch are one parameter, and logit scales are [1];
`to_canonical` and `from_canonical` are the only places that know.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2_ds.model.config import M2EncoderConfig

_FUSED = ".qkv_proj."
_PARTS = (".q_proj.", ".k_proj.", ".v_proj.")
LOGIT_SCALES = ("logit_scale", "logit_vl_scale")
LOGIT_BIASES = ("logit_bias", "logit_vl_bias")
_SCALARS = LOGIT_SCALES + LOGIT_BIASES
VISION_POSITIONS = "backbone.encoder.embed_positions.A.weight"
_ROWS_BEFORE_PATCHES = 3  # two unused rows and the class token's


def to_canonical(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The canonical entries (views) that one inner parameter stands for."""
    if _FUSED in name:
        for part, piece in zip(_PARTS, tensor.chunk(3)):
            yield name.replace(_FUSED, part), piece
    elif name in _SCALARS and tensor.numel():  # ZeRO-3 leaves empty tensors in place of partitioned weights
        yield name, tensor.reshape(())
    else:
        yield name, tensor


def canonical_names(name: str) -> list[str]:
    """The canonical names behind an inner parameter's."""
    return [name.replace(_FUSED, part) for part in _PARTS] if _FUSED in name else [name]


def from_canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A canonical state dict in the inner layout. Incomplete q, k, v triples are left as they are, to be reported."""
    inner: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _PARTS[0] in name:
            triple = [name.replace(_PARTS[0], part) for part in _PARTS]
            if all(part in state for part in triple):
                inner[name.replace(_PARTS[0], _FUSED)] = torch.cat([state[part] for part in triple])
                continue
        if any(part in name and name.replace(part, _PARTS[0]) in state for part in _PARTS[1:]):
            triple = [name.replace(part, other) for part in _PARTS if part in name for other in _PARTS]
            if all(part in state for part in triple):
                continue
        inner[name] = tensor.reshape(1) if name in _SCALARS and tensor.numel() else tensor
    return inner


def register_canonical_names(model: nn.Module) -> None:
    """Make ``model.state_dict()`` and ``model.load_state_dict`` speak canonical names."""

    def after_state_dict(module: nn.Module, state: MutableMapping[str, Tensor], prefix: str, _: Any) -> None:
        inner = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        for name, tensor in inner.items():
            state.update((prefix + canonical, piece) for canonical, piece in to_canonical(name, tensor))

    def before_load(module: nn.Module, state: MutableMapping[str, Tensor], prefix: str, *_: Any) -> None:
        own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        state.update((prefix + name, tensor) for name, tensor in from_canonical(own).items())

    model.register_state_dict_post_hook(after_state_dict)
    model.register_load_state_dict_pre_hook(before_load)


# -- initial values ---------------------------------------------------------------------------------------------------


def init_weights(model: nn.Module, config: M2EncoderConfig, seed: int) -> None:
    """Fill every parameter as the reference does when it builds a model.

    Each canonical tensor is drawn by a generator of its own, seeded by (seed, name): the values do not depend on the
    order of construction, so any parallel layout can draw the same ones.
    (torch's CPU generator reads 32 bits of a seed: hence a checksum of both.)
    """
    fan_ins = _fan_ins(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for canonical, piece in to_canonical(name, parameter):
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{canonical}".encode()))
                value = torch.empty(piece.shape, dtype=torch.float32)
                _initialiser(canonical, config, fan_ins.get(name, 0))(value, generator)
                piece.copy_(value)


def _fan_ins(model: nn.Module) -> dict[str, int]:
    """Inputs of one output unit, by name of weight and bias of every linear map and convolution."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            found[f"{prefix}.weight"] = found[f"{prefix}.bias"] = fan_in
    return found


def _initialiser(name: str, config: M2EncoderConfig, fan_in: int) -> Callable[[Tensor, torch.Generator], object]:
    def uniform(gain: float) -> Callable[[Tensor, torch.Generator], object]:
        bound = gain / math.sqrt(fan_in)
        return lambda x, g: x.uniform_(-bound, bound, generator=g)

    if name in LOGIT_SCALES:
        return lambda x, _: x.fill_(math.log(1 / 0.07))
    if name in LOGIT_BIASES:
        return lambda x, _: x.fill_(-10.0)  # as in SigLIP: nearly all places of the first batches are wrong answers
    if name.startswith(("itc_", "pooler.")):
        return lambda x, g: x.zero_() if name.endswith("bias") else x.normal_(0, 0.02, generator=g)
    if name.endswith("text_embed.weight"):
        return lambda x, g: x.normal_(0, config.hidden_size**-0.5, generator=g)
    if "embed_positions" in name:
        return lambda x, g: x.normal_(0, config.position_std, generator=g)
    if name.endswith(("cls_token", "mask_token")):
        return lambda x, _: x.zero_()
    if fan_in:
        if any(part in name for part in (".fc1.", ".fc2.", ".v_proj.", ".out_proj.")):
            layers = config.num_vl_layers if name.startswith("backbone_vl") else config.num_layers
            return uniform(math.sqrt(math.log(2 * layers)))  # Magneto's sub-LayerNorm scaling, biases included
        return uniform(1.0)
    return lambda x, _: x.zero_() if name.endswith("bias") else x.fill_(1)  # LayerNorms


def freeze_unused(model: nn.Module) -> list[str]:
    """Exclude from training what contrastive learning never reaches; returns the names.

    These are the B branch of the vision-language layers (captions take A there), the pooler, the final `norm` and the
    mask token: without a gradient they would only be decayed, and their optimizer state paid for.
    """
    frozen = []
    for name, parameter in model.named_parameters():
        in_vl_b = name.startswith("backbone_vl.") and ".B." in name
        if in_vl_b or name.startswith(("pooler.", "norm.")) or name.endswith("mask_token"):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


# -- loading ----------------------------------------------------------------------------------------------------------


def resize_positions(table: Tensor, num_patches: int) -> Tensor:
    """A vision position table [n + 3, D] for another square grid, [num_patches + 3, D], by area interpolation in fp32.

    Smaller and larger tables are both resized (the reference cuts larger ones).
    """
    if table.shape[0] == num_patches + _ROWS_BEFORE_PATCHES:
        return table
    head, patches = table[:_ROWS_BEFORE_PATCHES], table[_ROWS_BEFORE_PATCHES:]
    old, new = math.isqrt(max(len(patches), 0)), math.isqrt(num_patches)
    if old * old != len(patches) or old == 0:
        raise ValueError(
            f"a vision position table of {len(table)} rows holds {len(patches)} patches, which is no square grid; "
            "it cannot be resized"
        )
    grid = patches.float().T.reshape(1, -1, old, old)
    resized = F.interpolate(grid, size=(new, new), mode="area")[0].flatten(1).T.to(table.dtype)
    return torch.cat([head, resized])


def load_weights(
    model: nn.Module,
    config: M2EncoderConfig,
    state: Mapping[str, Tensor],
    where: str,
    tell: Callable[[str], object] = print,
) -> None:
    """Load a canonical state dict, resizing vision positions where the grid differs (and saying so through ``tell``).

    ``where`` names the file in errors. Raises ValueError with every missing and unexpected name, or every wrong shape.
    """
    expected = {canonical: t.shape for n, p in model.named_parameters() for canonical, t in to_canonical(n, p)}
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{where} does not hold the weights of this model.\n"
            f"  missing ({len(missing)}): {_some(missing)}\n  unexpected ({len(unexpected)}): {_some(unexpected)}\n"
            "Check that the configuration belongs to the checkpoint (layers, stem) and that names carry no prefix."
        )
    state = dict(state)
    positions = state[VISION_POSITIONS]
    if len(positions) != len(model.get_parameter(VISION_POSITIONS)):
        state[VISION_POSITIONS] = resize_positions(positions, config.num_patches)
        tell(
            f"{where}: vision position table resized from {len(positions)} to {len(state[VISION_POSITIONS])} rows "
            f"for {config.image_size} px pictures in {config.patch_size} px patches"
        )
    wrong = [f"{n} is {list(state[n].shape)}, not {list(s)}" for n, s in expected.items() if state[n].shape != s]
    if wrong:
        raise ValueError(
            f"{where}: {len(wrong)} tensors have another shape than the model: {_some(wrong)}.\n"
            "Check hidden_size, embed_dim, vocab_size and num_heads of the configuration."
        )
    model.load_state_dict(state)


def _some(names: Iterable[str], limit: int = 40) -> str:
    names = list(names)
    return (", ".join(names[:limit]) + (f", ... {len(names) - limit} more" if len(names) > limit else "")) or "none"
