"""Names, initial values and loading of weights.

The state dict speaks the release's names. Inside, q, k, v of a branch are one parameter, logit scales are [1], and a
layer with an adapter (m2_ds.model.lora) lies one module deeper; `to_canonical` and `from_canonical` are the only places
that know. A rank may hold a part of the layers and a piece of a weight (`Split`): `pieces` says which canonical
tensors, or what of them, an inner parameter holds, and every way in or out of a model goes through it.
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from m2_ds.model.config import M2EncoderConfig
from m2_ds.parallel.split import Split, split_of

_FUSED = ".qkv_proj."
_PARTS = (".q_proj.", ".k_proj.", ".v_proj.")
LOGIT_SCALES = ("logit_scale", "logit_vl_scale")
LOGIT_BIASES = ("logit_bias", "logit_vl_bias")
_SCALARS = LOGIT_SCALES + LOGIT_BIASES
MASKED_HEADS = ("masked_text_head.", "masked_image_head.")  # of no released network
VISION_POSITIONS = "backbone.encoder.embed_positions.A.weight"
ADAPTER_NAME = "default"  # peft's for the only adapter of a model
_BASE = ".base_layer.weight"
_TABLES = ("text_embed.weight", "embed_positions.A.weight", "embed_positions.B.weight")


def is_adapter(name: str) -> bool:
    """Whether an inner parameter is a factor of a LoRA adapter: no weight of the released network."""
    return ".lora_A." in name or ".lora_B." in name


def has_adapters(model: nn.Module) -> bool:
    return any(is_adapter(name) for name, _ in model.named_parameters())


def adapter_of(model: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter, float] | None:
    """A [r, D], B and alpha / r that belong to the weight of an inner ``name``; None where it is not adapted."""
    if not name.endswith(_BASE):
        return None
    layer: Any = model.get_submodule(name.removesuffix(_BASE))
    return layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight, layer.scaling[ADAPTER_NAME]


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling B A, a new tensor."""
    return weight + (b @ a) * scaling


def _plain(name: str) -> str:
    """Without what peft puts into the name of an adapted layer's weight and of an adapter."""
    return name.replace(f".{ADAPTER_NAME}.", ".") if is_adapter(name) else name.replace(".base_layer.", ".")


def to_canonical(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The canonical entries (views) that one inner parameter stands for; an adapter's factor keeps the layer's name."""
    adapter, name = is_adapter(name), _plain(name)
    if adapter:
        yield name, tensor
    elif _FUSED in name:
        for part, piece in zip(_PARTS, tensor.chunk(3)):
            yield name.replace(_FUSED, part), piece
    elif name in _SCALARS and tensor.numel():  # ZeRO-3 leaves empty tensors in place of partitioned weights
        yield name, tensor.reshape(())
    else:
        yield name, tensor


@dataclass(frozen=True)
class Piece:
    """A canonical tensor, or what this rank holds of it."""

    name: str
    tensor: Tensor
    split: Split | None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        shape = tuple(self.tensor.shape)
        return shape if self.split is None else self.split.whole_shape(shape)


def pieces(name: str, parameter: nn.Parameter, tensor: Tensor | None = None) -> Iterator[Piece]:
    """Of an inner parameter, or of a ``tensor`` of its shape (an optimizer's state, a gradient)."""
    for canonical, piece in to_canonical(name, parameter if tensor is None else tensor):
        yield Piece(canonical, piece, split_of(parameter))


def fill(
    model: nn.Module,
    value: Callable[[Piece], Tensor],
    opened: Callable[[nn.Parameter], AbstractContextManager[object]] = lambda _: contextlib.nullcontext(),
    adapters: bool = False,
) -> None:
    """Copy ``value`` (of the piece's shape, filling left out) into every piece of every parameter.

    ``opened``: a context in which a parameter's own tensor is all there; ``adapters``: fill these, and not the weights.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name) != adapters:
                continue
            with opened(parameter):
                for piece in pieces(name, parameter):
                    target = piece.tensor
                    if piece.split is not None:
                        target.zero_()
                        target = piece.split.filled(target)
                    target.copy_(value(piece))


def canonical_names(name: str) -> list[str]:
    """The canonical names behind an inner parameter's; an adapter of a joint q, k, v is found by each of the three."""
    name = _plain(name)
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
            # Adapters keep their names, by which peft finds them again.
            entries = [(name, tensor)] if is_adapter(name) else to_canonical(name, tensor)
            state.update((prefix + canonical, piece) for canonical, piece in entries)

    def before_load(module: nn.Module, state: MutableMapping[str, Tensor], prefix: str, *_: Any) -> None:
        own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        state.update((prefix + name, tensor) for name, tensor in from_canonical(own).items())

    model.register_state_dict_post_hook(after_state_dict)
    model.register_load_state_dict_pre_hook(before_load)


# -- initial values ---------------------------------------------------------------------------------------------------


def init_weights(
    model: nn.Module,
    config: M2EncoderConfig,
    seed: int,
    opened: Callable[[nn.Parameter], AbstractContextManager[object]] = lambda _: contextlib.nullcontext(),
) -> None:
    """Fill every parameter as the reference does when it builds a model.

    Each canonical tensor is drawn whole, by a generator of its own, seeded by (seed, name), and a rank keeps its piece:
    the values depend neither on the order of construction nor on the layout. ``opened`` as in `fill`.
    (torch's CPU generator reads 32 bits of a seed: hence a checksum of both.)
    """
    fan_ins = _fan_ins(model)

    def draw(piece: Piece) -> Tensor:
        value = initial(piece.name, piece.whole_shape, config, seed, fan_ins.get(piece.name, 0))
        return value if piece.split is None else piece.split.of(value)

    fill(model, draw, opened)


def initial(name: str, shape: tuple[int, ...], config: M2EncoderConfig, seed: int, fan_in: int = 0) -> Tensor:
    """The first values, fp32, of a whole canonical tensor. ``fan_in``: inputs of one output unit of a linear map."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    value = torch.empty(shape, dtype=torch.float32)
    _initialiser(name, config, fan_in)(value, generator)
    return value


def _fan_ins(model: nn.Module) -> dict[str, int]:
    """Inputs of one output unit, by canonical name of weight and bias of every linear map and convolution."""
    found = {}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3's partitioned parameters are empty
        if name.endswith(".weight") and len(shape) > 1 and not name.endswith(_TABLES):
            whole = split_of(parameter)
            fan_in = math.prod(whole.whole_shape(tuple(shape))[1:] if whole else shape[1:])
            for canonical in canonical_names(name):
                found[canonical] = found[canonical.removesuffix("weight") + "bias"] = fan_in
    return found


def _initialiser(name: str, config: M2EncoderConfig, fan_in: int) -> Callable[[Tensor, torch.Generator], object]:
    def uniform(gain: float) -> Callable[[Tensor, torch.Generator], object]:
        bound = gain / math.sqrt(fan_in)
        return lambda x, g: x.uniform_(-bound, bound, generator=g)

    if name in LOGIT_SCALES:
        return lambda x, _: x.fill_(math.log(1 / 0.07))
    if name in LOGIT_BIASES:
        return lambda x, _: x.fill_(-10.0)  # as in SigLIP: nearly all places of the first batches are wrong answers
    if name.startswith(("itc_", "pooler.")) or (name.startswith(MASKED_HEADS) and ".norm." not in name):
        return lambda x, g: x.zero_() if name.endswith("bias") else x.normal_(0, 0.02, generator=g)
    if name.endswith("text_embed.weight"):
        return lambda x, g: x.normal_(0, config.hidden_size**-0.5, generator=g)
    if "embed_positions" in name:
        std = config.patch_position_std if name == VISION_POSITIONS else None
        return lambda x, g: x.normal_(0, std or config.position_std, generator=g)
    if name.endswith(("cls_token", "mask_token")):
        return lambda x, _: x.zero_()
    if fan_in:
        if any(part in name for part in (".fc1.", ".fc2.", ".v_proj.", ".out_proj.")):
            layers = config.num_vl_layers if name.startswith("backbone_vl") else config.num_layers
            return uniform(math.sqrt(math.log(2 * layers)))  # Magneto's sub-LayerNorm scaling, biases included
        return uniform(1.0)
    return lambda x, _: x.zero_() if name.endswith("bias") else x.fill_(1)  # LayerNorms


def freeze_unused(model: nn.Module, joint: bool = False, hidden_patches: bool = False) -> list[str]:
    """Exclude from training what the losses never reach; returns the names.

    These are the pooler, the final `norm`, the B branch of the vision-language layers (captions alone take A there)
    unless pairs run ``joint``, and the mask token unless there are ``hidden_patches``: without a gradient they would
    only be decayed, and their optimizer state paid for.
    """
    frozen = []
    for name, parameter in model.named_parameters():
        vl_b = not joint and name.startswith("backbone_vl.") and ".B." in name
        mask_token = not hidden_patches and name.endswith("mask_token")
        if vl_b or mask_token or name.startswith(("pooler.", "norm.")):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen
