"""One M2-Encoder layer: attention and feed-forward with sub-LayerNorms, each weight in two branches (A vision, B text).

Whether its widths are whole on this rank is decided by the `Layers` that it is built from.

Source of every formula: the network of M2-Encoder (arXiv 2401.15896), Magneto's sub-LayerNorm (arXiv 2210.06423).
Legend: B samples, T tokens, D width, H heads, d = D / H.

``split`` says which branch a token takes: -1 all A, 0 all B, s > 0 the first s A and the rest B.

Sequences may run packed: x is [1, N', D], the tokens of all samples one after another, and only attention sees them as
[B, T, D] (`Packing`). Then padding can be left out, and tokens can be cut over ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.layers import Layers
from m2_ds.model.random import Noise

ALL_A, ALL_B = -1, 0
LAYER_NORM_EPS = 1e-5


class Multiway(nn.Module):
    """Two modules of one kind, ``A`` and ``B``, drawn independently; tokens [B, T, D] choose by ``split``."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.A = make()
        self.B = make()

    def forward(self, x: Tensor, split: int, *more: Tensor) -> Any:
        """``more``: what the modules take beside x, where all tokens take one branch."""
        if split == ALL_A:
            return self.A(x, *more)
        if split == ALL_B:
            return self.B(x, *more)
        return torch.cat([self.A(x[:, :split]), self.B(x[:, split:])], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for q, k, v [B, H, T, d]; ``mask`` boolean (True: may attend) or None.

    On a CPU low precision is widened: torch's bf16 attention backward is several times slower there than fp32
    (docs/decisions.md). Without a mask flash kernels are eligible on a GPU.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
        return out.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@dataclass(frozen=True)
class Packing:
    """Where the N tokens that run of a [B, T] batch lie: ``rows`` int64 [N'] into B T, ``sample`` int64 [N'] into B.

    ``first`` int64 [B]: where each sample begins among the N'. Where tokens are cut over ranks, ``sample`` is of this
    rank's.

    N' is N rounded up, the rest repeating the first token: oneDNN prepares a product anew for every shape that it has
    not seen, which cost 40% of the time and 8 MB a step in bf16 when N was left as it came.
    """

    rows: Tensor
    sample: Tensor
    first: Tensor
    tokens: int
    batch: int
    length: int

    @classmethod
    def of(cls, valid: Tensor, multiple: int = 128) -> "Packing":
        """From a bool [B, T] mask. Reads the mask on the host; ValueError where a sample's first token is padding."""
        if not valid[:, 0].all():
            empty = (~valid[:, 0]).nonzero()[:, 0].tolist()
            raise ValueError(
                f"captions {empty} of the batch have padding in place of their class token; check the mask"
            )
        real = valid.flatten().nonzero()[:, 0]
        rows = F.pad(real, (0, -len(real) % multiple))
        lengths = valid.sum(1)
        return cls(rows, rows // valid.shape[1], lengths.cumsum(0) - lengths, len(real), *valid.shape)

    @classmethod
    def whole(cls, x: Tensor, multiple: int) -> "Packing":
        """Every token of x [B, T, D]."""
        (batch, length), device = x.shape[:2], x.device
        tokens = torch.arange(batch * length, device=device)
        rows = F.pad(tokens, (0, -len(tokens) % multiple))
        return cls(rows, rows // length, tokens[::length], len(tokens), batch, length)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, N', ...]"""
        return x.flatten(0, 1).index_select(0, self.rows)[None]

    def pad(self, x: Tensor) -> Tensor:
        """[1, N', ...] -> [B, T, ...], zeros at padding."""
        out = x.new_zeros(self.batch * self.length, *x.shape[2:])
        return out.index_copy(0, self.rows[: self.tokens], x[0, : self.tokens]).unflatten(0, (self.batch, self.length))


class Attention(nn.Module):
    """Multi-head self-attention with a LayerNorm over the concatenated heads before the output projection.

    q, k and v are one product; the state dict speaks of q_proj, k_proj and v_proj (m2_ds.model.weights).
    """

    def __init__(self, config: M2EncoderConfig, layers: Layers) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_size = width // config.num_heads
        self.qkv_proj = Multiway(lambda: layers.query_key_value(width))
        self.inner_attn_ln = Multiway(lambda: layers.split_norm(width, LAYER_NORM_EPS))
        self.out_proj = Multiway(lambda: layers.row(width, width))

    def forward(
        self,
        x: Tensor,
        split: int,
        mask: Tensor | None,
        packing: Packing | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; with ``queries`` [B, Q, D], which attend to x, [B, Q, D]."""
        if queries is not None:
            q, kv = self.qkv_proj(x, split, queries)
            q, k, v = map(self._heads, (q, *(kv if packing is None else packing.pad(kv)).chunk(2, dim=-1)))
            a = attend(q, k, v, mask).transpose(1, 2).flatten(-2)
            return self.out_proj(self.inner_attn_ln(a, split), split)
        qkv = self.qkv_proj(x, split)
        qkv = qkv if packing is None else packing.pad(qkv)
        # Cut along the width: backward then joins three gradients in one copy, where unbinding an axis takes two.
        q, k, v = map(self._heads, qkv.chunk(3, dim=-1))
        a = attend(q, k, v, mask).transpose(1, 2).flatten(-2)
        a = a if packing is None else packing.pack(a)
        return self.out_proj(self.inner_attn_ln(a, split), split)

    def _heads(self, x: Tensor) -> Tensor:
        """Of this rank: its share of the width is a share of the heads."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class FeedForward(nn.Module):
    """GELU(x W1) -> LayerNorm over 4 D -> W2."""

    def __init__(self, config: M2EncoderConfig, layers: Layers) -> None:
        super().__init__()
        self.fc1 = layers.column(config.hidden_size, config.ffn_size)
        self.ffn_layernorm = layers.split_norm(config.ffn_size, LAYER_NORM_EPS)
        self.fc2 = layers.row(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


class MultiwayLayer(nn.Module):
    """A pre-norm transformer layer. ``index`` numbers its random decisions, ``drop_path`` is its own rate."""

    def __init__(self, config: M2EncoderConfig, layers: Layers, index: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.index = index
        self.drop_path = drop_path
        width = config.hidden_size
        self.self_attn_layer_norm = Multiway(lambda: layers.norm(width, LAYER_NORM_EPS))
        self.self_attn = Attention(config, layers)
        # The pre-FFN norm, in spite of its name.
        self.final_layer_norm = Multiway(lambda: layers.norm(width, LAYER_NORM_EPS))
        self.ffn = Multiway(lambda: FeedForward(config, layers))

    def forward(
        self,
        x: Tensor,
        split: int,
        mask: Tensor | None = None,
        noise: Noise | None = None,
        packing: Packing | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D], or [1, N', D] with ``packing``; with ``first_only`` first tokens alone: [B, 1, D].

        ``mask`` (bool, broadcast to [B, H, T, T], True: may attend). ``noise`` given: residual branches are dropped by
        sample at the layer's rate.
        """
        normed = self.self_attn_layer_norm(x, split)
        if first_only:
            attended = self.self_attn(normed, split, mask, packing, _first(normed, packing))
            x, packing = _first(x, packing), None
        else:
            attended = self.self_attn(normed, split, mask, packing)
        x = self._residual(x, attended, noise, 0, packing)
        return self._residual(x, self.ffn(self.final_layer_norm(x, split), split), noise, 1, packing)

    def _residual(self, x: Tensor, branch: Tensor, noise: Noise | None, which: int, packing: Packing | None) -> Tensor:
        if noise is None or self.drop_path == 0.0:
            return x + branch
        kept = noise.uniform(2 * self.index + which) >= self.drop_path  # [B, 1]
        kept = kept[:, :, None] if packing is None else kept[packing.sample][None]
        return x + branch * (kept.to(branch.dtype) / (1.0 - self.drop_path))


def _first(x: Tensor, packing: Packing | None) -> Tensor:
    """The first token of every sample: [B, 1, D]."""
    return x[:, :1] if packing is None else x[0].index_select(0, packing.first)[:, None]
