"""Low-rank adapters by peft: W x + (alpha / rank) B A x with W frozen (LoRA, arXiv 2106.09685).

A folder of adapters is peft's own, so that it can be shared:
  adapter_config.json            peft's LoraConfig; `revision` is the digest of the weights that were adapted
  adapter_model.safetensors      A and B of every layer, fp32, under peft's names
  trained.safetensors            what else was trained, under canonical names: peft does not read it, `merge_adapter`
                                 does
Legend: D width, r rank.
"""

import hashlib
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners import lora
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from m2_ds.model.config import LoraConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.layers import QueryKeyValue
from m2_ds.model.weights import ADAPTER_NAME, Piece, canonical_names, fill, merged, pieces

PREFIX = "base_model.model."  # of peft's names in adapter_model.safetensors
CONFIG, ADAPTERS, TRAINED = "adapter_config.json", "adapter_model.safetensors", "trained.safetensors"


class LoraQueryKeyValue(lora.Linear):
    """An adapted `QueryKeyValue`. q, k and v share A [r, D]; B is [3 D, r]."""

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Any:
        if queries is None:
            return super().forward(x)
        q, kv = self.base_layer(x, queries)
        # Whole products, of which a part is used: they are thin, and ZeRO 3 gathers weights for whole layers only.
        return q + self._delta(queries)[..., : q.shape[-1]], kv + self._delta(x)[..., q.shape[-1] :]

    def _delta(self, x: Tensor) -> Tensor:
        """(alpha / r) B A x: [..., D] -> [..., 3 D]"""
        out: Tensor = self.lora_B[ADAPTER_NAME](self.lora_A[ADAPTER_NAME](x)) * self.scaling[ADAPTER_NAME]
        return out


def adaptable(model: M2Encoder, pattern: str) -> list[str]:
    """Inner names of the linear layers that ``pattern`` finds and whose weights the loss reaches.

    Raises ValueError where it finds none.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    found = [name for name in layers if any(re.search(pattern, n) for n in _module_names(name))]
    if not found:
        raise ValueError(
            f"lora.pattern '{pattern}' finds no linear layer that trains. Names look like "
            "backbone.encoder.layers.0.self_attn.q_proj.A, backbone.encoder.layers.0.ffn.B.fc1, itc_vl_image_proj.fc"
        )
    return found


def _module_names(layer: str) -> list[str]:
    return [name.removesuffix(".weight") for name in canonical_names(f"{layer}.weight")]


def adapted_weights(layers: Iterable[str]) -> list[str]:
    """Canonical names of the weights of layers, given their inner names."""
    return [f"{name}.weight" for layer in layers for name in _module_names(layer)]


def add_adapters(model: M2Encoder, config: LoraConfig, layers: list[str], base: str, digest: str) -> None:
    """Put an adapter without values beside each of ``layers``; which weights train is not changed.

    ``base`` and ``digest``: where the weights came from, and their `digest_of`, for whoever gets the adapters.
    """
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by r, nothing else
        target_modules=layers,
        init_lora_weights=False,  # drawn by `draw_adapters`, as ZeRO 3 needs it
        base_model_name_or_path=base,
        revision=digest,
    )
    wanted._register_custom_module({QueryKeyValue: LoraQueryKeyValue})
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    peft.inject_adapter_in_model(wanted, model, ADAPTER_NAME)
    for parameter, trains in trained.items():  # peft froze all
        parameter.requires_grad_(trains)
    found = {name for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)}
    assert found == set(layers), f"peft adapted other layers: {sorted(found ^ set(layers))}"


def draw_adapters(
    model: M2Encoder, seed: int, opened: Callable[[nn.Parameter], AbstractContextManager[object]]
) -> None:
    """A from U(-1/sqrt(D), 1/sqrt(D)), which is peft's choice, B zero: the model is what it was.

    Drawn by (seed, name), as `m2_ds.model.weights.init_weights` does.
    """

    def draw(piece: Piece) -> Tensor:
        value = torch.zeros(piece.whole_shape)
        if ".lora_A." in piece.name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{piece.name}".encode()))
            bound = 1 / math.sqrt(value.shape[1])
            value.uniform_(-bound, bound, generator=generator)
        return value

    fill(model, draw, opened, adapters=True)


def settings_of(model: M2Encoder) -> dict[str, Any]:
    """What adapter_config.json holds, in an order that does not change from run to run."""
    config: Any = model.peft_config[ADAPTER_NAME]  # type: ignore[union-attr, index]
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return {**fields, "inference_mode": True}


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ValueError that names the file."""
    try:
        return peft.LoraConfig.from_json_file(str(folder / CONFIG))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from None


def read_adapters(folder: Path, file: str = ADAPTERS) -> dict[str, Tensor]:
    """Tensors of a folder of adapters without peft's prefix. Raises ValueError that names the file."""
    try:
        return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / file).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / file} cannot be read: {error}") from None


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of the numbers in fp32, whatever precision they are stored in."""
    return hashlib.sha256(tensor.detach().cpu().float().flatten().numpy().data).hexdigest()


def digest_of(digests: Mapping[str, str]) -> str:
    """One for all, from `tensor_digest` by name."""
    listed = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"


@torch.no_grad()
def merge_adapter(model: M2Encoder, folder: Path | str) -> None:
    """Make a model (fp32, on any device) what a folder of adapters was trained to be.

    Raises ValueError where the folder cannot be read or was trained on other weights.
    """
    folder = Path(folder)
    settings, factors = read_settings(folder), read_adapters(folder)
    others = read_adapters(folder, TRAINED) if (folder / TRAINED).exists() else {}
    layers = sorted({name.partition(".lora_")[0] for name in factors})
    state = model.state_dict()
    names = adapted_weights(layers)
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"{folder} adapts {missing[0]}, which this model does not have: it is for another model")
    found = digest_of({name: tensor_digest(state[name]) for name in names})
    if found != settings.get("revision"):
        raise ValueError(
            f"{folder} was trained on other weights than these: on {settings.get('base_model_name_or_path')}, digest "
            f"{settings.get('revision')}, not {found}. Load those, in fp32"
        )
    scaling = settings["lora_alpha"] / settings["r"]
    for layer in layers:
        weight = model.get_submodule(layer).weight
        a, b = (factors[f"{layer}.lora_{x}.weight"].to(weight) for x in "AB")  # type: ignore[arg-type]
        weight.copy_(merged(weight, a, b, scaling))  # type: ignore[operator, arg-type]
    for name, parameter in model.named_parameters():
        for piece in pieces(name, parameter):
            if piece.name in others:
                piece.tensor.copy_(others[piece.name])
