"""The M2-Encoder: embeddings, backbone, vision-language stack and the four contrastive heads.

Legend: B pictures or captions, S image side, P patches, L text tokens, T tokens of a sequence, D width, E embedding.
Module and parameter names are the release's own (m2_ds.model.weights says where the inside differs).
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.multiway import ALL_A, ALL_B, Multiway, MultiwayLayer, Packing, layer_norm
from m2_ds.model.random import Noise
from m2_ds.model.stem import ConvStem, PatchProjection
from m2_ds.model.weights import register_canonical_names

POSITION_OFFSET = 2  # fairseq's: row 0 and 1 of a position table are never read
_PATCH_DROP_DECISION = 1 << 20  # outside the range that layers number theirs in


class Features(NamedTuple):
    """Unit vectors [B, E] of one modality, after the backbone and after the vision-language stack."""

    unimodal: Tensor
    vl: Tensor


class LogitParameters(NamedTuple):
    """logit_scale [1] and, with ``logit_bias``, bias [1] of the unimodal and the vision-language level."""

    scale: tuple[Tensor, Tensor]
    bias: tuple[Tensor, Tensor] | None


class Encoder(nn.Module):
    """Layers and a final LayerNorm; the backbone's also adds positions."""

    def __init__(
        self, config: M2EncoderConfig, num_layers: int, first_index: int, positions: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.recompute = config.recompute
        depth = config.num_layers + config.num_vl_layers
        rates = [config.drop_path * i / max(depth - 1, 1) for i in range(first_index, first_index + num_layers)]
        self.layers = nn.ModuleList(MultiwayLayer(config, first_index + i, rate) for i, rate in enumerate(rates))
        self.layer_norm = Multiway(lambda: layer_norm(config.hidden_size))
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
        if valid is not None and valid.device.type == "cpu" and attention_mask is None and split in (ALL_A, ALL_B):
            packing = Packing.of(valid)
            x = self._layers_and_norm(packing.pack(x), split, valid[:, None, None, :], noise, packing, first_only)
            return x if first_only and len(self.layers) else packing.pad(x)
        mask = None
        if valid is not None:
            x = x * valid[..., None].to(x.dtype)
            mask = valid[:, None, None, :]
        if attention_mask is not None:
            allowed = attention_mask if attention_mask.dim() == 2 else attention_mask[:, None]
            mask = allowed if mask is None else mask & allowed
        return self._layers_and_norm(x, split, mask, noise, None, first_only)

    def _layers_and_norm(
        self,
        x: Tensor,
        split: int,
        mask: Tensor | None,
        noise: Noise | None,
        packing: Packing | None,
        first_only: bool,
    ) -> Tensor:
        for number, layer in enumerate(self.layers, 1):
            x = self._run(layer, x, split, mask, noise, packing, first_only and number == len(self.layers))
        return self.layer_norm(x, split)

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


class VisionEmbedding(nn.Module):
    """Pictures to tokens: uint8 [B, 3, S, S] (or float in [0, 1]) -> [B, P + 1, D], class token first."""

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.proj: nn.Module = ConvStem(config) if config.stem == "conv" else PatchProjection(config)

    def normalise(self, images: Tensor) -> Tensor:
        """(x - 0.5) / 0.5 in the weights' dtype, from uint8 or from floats in [0, 1]."""
        x = images.to(self.cls_token.dtype)
        if images.dtype == torch.uint8:
            x = x / 255
        return (x - 0.5) / 0.5

    def fit(self, images: Tensor) -> None:
        """Adapt a conv stem's initial scales and shifts to pictures uint8 [B, 3, S, S] (`ConvStem.fit`)."""
        assert isinstance(self.proj, ConvStem)
        self.proj.fit(self.normalise(images))

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """``masked`` (bool [B, P]) puts the mask token in place of patches."""
        if images.dim() != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images have shape {list(images.shape)}; this model takes [B, 3, {self.image_size}, {self.image_size}]"
            )
        x = self.proj(self.normalise(images))
        if masked is not None:
            m = masked[..., None].to(x.dtype)
            x = x * (1 - m) + self.mask_token * m
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)


class Backbone(nn.Module):
    """Token and patch embeddings and the modality-specific layers."""

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        self.text_embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embed = VisionEmbedding(config)
        rows = (config.num_patches + 1 + POSITION_OFFSET, config.text_positions)
        self.encoder = Encoder(config, config.num_layers, first_index=0, positions=rows)


class Head(nn.Module):
    """Bias-free linear map of the class token and L2 normalisation: [B, T, D] -> [B, E]."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, embed_dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        # Half-precision features are normalised in fp32: the loss compares their cosines with a scale of up to 100.
        x = self.fc(hidden[:, 0])
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return x / x.norm(dim=-1, keepdim=True)


class Pooler(nn.Module):
    """Part of the released state dict that no path uses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)


class M2Encoder(nn.Module):
    """Bilingual image-text encoder. ``encode_image``, ``encode_text`` give the embeddings, ``forward`` both levels."""

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, embed = config.hidden_size, config.embed_dim
        # [1] inside because DeepSpeed cannot broadcast 0-dim tensors on CPU; () in the state dict.
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_vl_scale = nn.Parameter(torch.zeros(1))
        if config.logit_bias:
            self.logit_bias = nn.Parameter(torch.zeros(1))
            self.logit_vl_bias = nn.Parameter(torch.zeros(1))
        self.backbone = Backbone(config)
        self.backbone_vl = Encoder(config, config.num_vl_layers, first_index=config.num_layers)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pooler = Pooler(width)
        self.itc_text_proj = Head(width, embed)
        self.itc_image_proj = Head(width, embed)
        self.itc_vl_text_proj = Head(width, embed)
        self.itc_vl_image_proj = Head(width, embed)
        register_canonical_names(self)

    # -- one modality ------------------------------------------------------------------------------------------------

    def image_hidden(self, images: Tensor, masked: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Backbone states [B, T, D] of pictures; with ``noise``, a share ``patch_drop`` of the patches is left out."""
        encoder = self.backbone.encoder
        x = encoder.add_positions(self.backbone.vision_embed(images, masked), "A")
        if noise is not None and self.config.patch_drop > 0:
            x = drop_patches(x, self.config.patch_drop, noise)
        return encoder(x, ALL_A, noise=noise)

    def text_hidden(self, ids: Tensor, valid: Tensor | None, noise: Noise | None = None) -> Tensor:
        """Backbone states [B, L, D] of captions; rows beyond a caption's end are zeros."""
        encoder = self.backbone.encoder
        x = encoder.add_positions(self.backbone.text_embed(ids), "B")
        return encoder(x, ALL_B, valid, noise)

    def image_features(self, images: Tensor, noise: Noise | None = None) -> Features:
        """Both levels' unit vectors of pictures uint8 or float [B, 3, S, S]."""
        hidden = self.image_hidden(images, noise=noise)
        vl = self.backbone_vl(hidden, ALL_A, noise=noise, first_only=True)
        return Features(self.itc_image_proj(hidden), self.itc_vl_image_proj(vl))

    def text_features(self, ids: Tensor, mask: Tensor, noise: Noise | None = None) -> Features:
        """Both levels' unit vectors of captions ``ids`` [B, L], ``mask`` [B, L] (1 token, 0 padding)."""
        ids, valid = cut_to_longest(ids, mask)
        hidden = self.text_hidden(ids, valid, noise)
        # Text, too, takes the A branch of the vision-language layers (so do the released weights).
        vl = self.backbone_vl(hidden, ALL_A, valid, noise, first_only=True)
        return Features(self.itc_text_proj(hidden), self.itc_vl_text_proj(vl))

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings [B, E], unit length, of pictures uint8 (or float in [0, 1]) [B, 3, S, S]."""
        return self.image_features(images).vl

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [B, E], unit length, of captions ``ids`` int64 [B, L], ``mask`` [B, L] (1 token, 0 padding)."""
        return self.text_features(ids, mask).vl

    # -- both ---------------------------------------------------------------------------------------------------------

    def joint_hidden(
        self,
        images: Tensor,
        ids: Tensor,
        mask: Tensor,
        masked: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Backbone states [B, P + 1 + L, D] of pictures and captions in one sequence, each token by its own branch.

        Fewer captions than pictures are repeated. ``attention_mask`` as in `Encoder`.
        """
        encoder = self.backbone.encoder
        if len(ids) < len(images):
            if len(images) % len(ids):
                raise ValueError(f"{len(ids)} captions cannot be repeated for {len(images)} pictures")
            repeats = len(images) // len(ids)
            ids, mask = ids.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
        vision = encoder.add_positions(self.backbone.vision_embed(images, masked), "A")
        text = encoder.add_positions(self.backbone.text_embed(ids), "B")
        valid = torch.cat([mask.new_ones(vision.shape[:2]), mask], dim=1).bool()
        return encoder(torch.cat([vision, text], dim=1), vision.shape[1], valid, attention_mask=attention_mask)

    def fuse(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Vision-language states [B, P + 1 + L, D] of picture-caption pairs (text by the B branch)."""
        hidden = self.joint_hidden(images, ids, mask)
        split = hidden.shape[1] - ids.shape[1]
        valid = torch.cat([mask.new_ones(len(hidden), split), mask.expand(len(hidden), -1)], dim=1).bool()
        return self.backbone_vl(hidden, split, valid)

    def forward(
        self,
        images: Tensor,
        ids: Tensor,
        mask: Tensor,
        image_noise: Noise | None = None,
        text_noise: Noise | None = None,
    ) -> tuple[Features, Features, LogitParameters]:
        """Features of pictures and of captions, and what turns their cosines into logits (part of the graph)."""
        scale = (self.logit_scale * 1.0, self.logit_vl_scale * 1.0)
        bias = (self.logit_bias * 1.0, self.logit_vl_bias * 1.0) if self.config.logit_bias else None
        image = self.image_features(images, image_noise)
        return image, self.text_features(ids, mask, text_noise), LogitParameters(scale, bias)


def cut_to_longest(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Drop the columns that no caption of the batch uses; the mask as bool, or None where nothing is padded.

    Reads the mask on the host, which a GPU would wait for: batches of the stream are cut when they are built.
    """
    if mask.device.type != "cpu":
        return ids, mask.bool()
    lengths = mask.sum(dim=1)
    longest, shortest = int(lengths.max()), int(lengths.min())
    return ids[:, :longest], None if shortest == longest else mask[:, :longest].bool()


def drop_patches(x: Tensor, share: float, noise: Noise) -> Tensor:
    """FLIP (arXiv 2212.00794): keep the class token and a random 1 - ``share`` of the patches, in order."""
    patches = x.shape[1] - 1
    kept = max(1, round(patches * (1 - share)))
    order = noise.uniform(_PATCH_DROP_DECISION, patches).argsort(dim=1)[:, :kept].sort(dim=1).values
    rows = order[..., None].expand(-1, -1, x.shape[2]) + 1
    return torch.cat([x[:, :1], x.gather(1, rows)], dim=1)
