"""A stack of layers, whole or in part: the backbone and the vision-language stack are one each.

Legend: B samples, T tokens, D width.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.layers import Layers
from m2_ds.model.multiway import ALL_A, ALL_B, LAYER_NORM_EPS, Multiway, MultiwayLayer, Packing
from m2_ds.model.random import Noise

POSITION_OFFSET = 2  # fairseq's: row 0 and 1 of a position table are never read


@dataclass(frozen=True)
class Part:
    """What of a model is on this rank: layers [``start``, ``end``) of the backbone's and then the vl stack's.

    The first part has the embeddings, the last one the heads and logit scales; a stack's final LayerNorm comes with its
    last layer.
    """

    start: int
    end: int
    is_first: bool = True
    is_last: bool = True

    @classmethod
    def whole(cls, config: M2EncoderConfig) -> "Part":
        return cls(0, config.num_layers + config.num_vl_layers)

    def layers(self, first: int, count: int) -> range:
        """Of a stack of ``count`` layers that begins at layer ``first``: those that are here, numbered in the stack."""
        return range(max(self.start - first, 0), max(min(self.end - first, count), 0))

    def has_backbone_end(self, config: M2EncoderConfig) -> bool:
        return self.start < config.num_layers <= self.end or (self.is_first and config.num_layers == 0)


class Encoder(nn.Module):
    """Layers and a final LayerNorm; the backbone's also adds positions. Those of a ``Part``."""

    def __init__(
        self,
        config: M2EncoderConfig,
        layers: Layers,
        numbers: range,
        first_index: int,
        ends: bool = True,
        positions: tuple[int, int] | None = None,
    ) -> None:
        """``numbers``: of its layers, of which the first is the model's ``first_index``-th; ``ends``: has the norm."""
        super().__init__()
        self.recompute = config.recompute
        self._scatter, self._gather, self._own = layers.scatter, layers.gather, layers.own
        self.sequence_ranks = layers.sequence_ranks
        depth = config.num_layers + config.num_vl_layers
        self.layers = nn.ModuleDict()
        for i in numbers:
            rate = config.drop_path * (first_index + i) / max(depth - 1, 1)
            self.layers[str(i)] = MultiwayLayer(config, layers, first_index + i, rate)
        if ends:
            self.layer_norm = Multiway(lambda: layers.norm(config.hidden_size, LAYER_NORM_EPS))
        if positions is not None:
            self.embed_positions = nn.ModuleDict(
                {branch: nn.Embedding(rows, config.hidden_size) for branch, rows in zip("AB", positions)}
            )

    def add_positions(self, x: Tensor, branch: str) -> Tensor:
        """[B, T, D] plus rows 2 .. T + 1 of the branch's table."""
        table = cast(nn.Embedding, self.embed_positions[branch])
        available = table.num_embeddings - POSITION_OFFSET
        if x.shape[1] > available:
            raise ValueError(f"a sequence of {x.shape[1]} tokens does not fit the position table of {available} rows")
        return x + table(torch.arange(POSITION_OFFSET, POSITION_OFFSET + x.shape[1], device=x.device))

    def forward(
        self,
        x: Tensor,
        split: int,
        valid: Tensor | None = None,
        noise: Noise | None = None,
        attention_mask: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D], or [B, 1, D] with ``first_only``: then the last layer computes first tokens alone.

        ``valid`` (bool [B, T], None: all) marks real tokens: others enter as zeros and are never attended to.
        ``attention_mask`` (bool [T, T] or [B, T, T], True: may attend) restricts further. With neither split nor
        restriction, a CPU does not compute padding at all (a GPU would wait for the mask): its rows are zeros.
        """
        assert not first_only or (attention_mask is None and split in (ALL_A, ALL_B))
        one_branch = attention_mask is None and split in (ALL_A, ALL_B)
        if self.sequence_ranks > 1 and not one_branch:
            raise ValueError(
                "pictures and captions in one sequence, or an attention mask, need parallel.sequence_parallel: false"
            )
        packing = None
        if valid is not None and valid.device.type == "cpu" and one_branch:
            packing = Packing.of(valid, math.lcm(128, self.sequence_ranks))
        elif self.sequence_ranks > 1 and one_branch:
            packing = Packing.whole(x, self.sequence_ranks)
        mask = None if valid is None else valid[:, None, None, :]
        if packing is not None:
            return self._packed(x, split, valid, mask, noise, packing, first_only)
        if valid is not None:
            x = x * valid[..., None].to(x.dtype)
        if attention_mask is not None:
            allowed = attention_mask if attention_mask.dim() == 2 else attention_mask[:, None]
            mask = allowed if mask is None else mask & allowed
        return self._layers_and_norm(x, split, mask, noise, None, first_only)

    def _packed(
        self,
        x: Tensor,
        split: int,
        valid: Tensor | None,
        mask: Tensor | None,
        noise: Noise | None,
        packing: Packing,
        first_only: bool,
    ) -> Tensor:
        if valid is not None and packing.tokens == valid.numel():  # padding runs, too
            x = x * valid[..., None].to(x.dtype)
        if self.sequence_ranks == 1:
            x = self._layers_and_norm(packing.pack(x), split, mask, noise, packing, first_only)
            return x if first_only and len(self.layers) else packing.pad(x)
        # Every rank has first tokens of some samples only, so the last layer computes all.
        own = replace(packing, sample=self._own(packing.sample))
        return packing.pad(
            self._gather(self._layers_and_norm(self._scatter(packing.pack(x)), split, mask, noise, own, False))
        )

    def _layers_and_norm(
        self,
        x: Tensor,
        split: int,
        mask: Tensor | None,
        noise: Noise | None,
        packing: Packing | None,
        first_only: bool,
    ) -> Tensor:
        for number, layer in enumerate(self.layers.values(), 1):
            x = self._run(layer, x, split, mask, noise, packing, first_only and number == len(self.layers))
        return self.layer_norm(x, split) if hasattr(self, "layer_norm") else x

    def _run(self, layer: nn.Module, *inputs: object) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return layer(*inputs)
        # Every random decision is a function of its inputs, so no generator state needs to be kept.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.recompute == "selective":
            options["context_fn"] = _keep_matrix_products
        return checkpoint(layer, *inputs, **options)


def _keep_matrix_products() -> tuple[object, object]:
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts([aten.mm.default, aten.addmm.default])
