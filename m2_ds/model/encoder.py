"""The M2-Encoder: embeddings, backbone, vision-language stack and the four contrastive heads.

Legend: B pictures or captions, S image side, P patches, L text tokens, T tokens of a sequence, D width, E embedding.
Module and parameter names are the release's own (m2_ds.model.weights says where the inside differs).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.layers import WHOLE, Layers
from m2_ds.model.masked import (
    ImageHead,
    MaskedInputs,
    MaskedSums,
    TextHead,
    image_sums,
    joint_noise,
    joint_valid,
    text_sums,
)
from m2_ds.model.multiway import ALL_A, ALL_B
from m2_ds.model.random import Noise
from m2_ds.model.stack import POSITION_OFFSET, Encoder, Part
from m2_ds.model.stem import ConvStem, PatchProjection
from m2_ds.model.weights import LOGIT_BIASES, LOGIT_SCALES, pieces, register_canonical_names

HEADS = ("itc_text_proj", "itc_image_proj", "itc_vl_text_proj", "itc_vl_image_proj")
_PATCH_DROP_DECISION = 1 << 20  # outside the range that layers number theirs in


class Features(NamedTuple):
    """Unit vectors [B, E] of one modality, after the backbone and after the vision-language stack."""

    unimodal: Tensor
    vl: Tensor


class LogitParameters(NamedTuple):
    """logit_scale [1] and, with ``logit_bias``, bias [1] of the unimodal and the vision-language level."""

    scale: tuple[Tensor, Tensor]
    bias: tuple[Tensor, Tensor] | None


class Outputs(NamedTuple):
    """Of a training forward: features of pictures and captions, what makes logits of their cosines, masked sums."""

    image: Features
    text: Features
    logits: LogitParameters
    masked: MaskedSums | None


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
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x if masked is None else self.hide(x, masked)

    def hide(self, x: Tensor, masked: Tensor) -> Tensor:
        """Tokens [B, P + 1, D] with the mask token in place of patches, by bool [B, P]."""
        m = F.pad(masked, (1, 0))[..., None].to(x.dtype)
        return x * (1 - m) + self.mask_token * m


class Backbone(nn.Module):
    """Token and patch embeddings and the modality-specific layers."""

    def __init__(self, config: M2EncoderConfig, layers: Layers, part: Part) -> None:
        super().__init__()
        rows = None
        if part.is_first:
            self.text_embed = layers.token_table(config.vocab_size, config.hidden_size)
            self.vision_embed = VisionEmbedding(config)
            rows = (config.num_patches + 1 + POSITION_OFFSET, config.text_positions)
        numbers = part.layers(0, config.num_layers)
        self.encoder = Encoder(config, layers, numbers, 0, part.has_backbone_end(config), rows)


class Head(nn.Module):
    """Bias-free linear map of the class token and L2 normalisation: [B, T, D] -> [B, E]."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, embed_dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.each(hidden[:, 0])

    def each(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        # Half-precision features are normalised in fp32: the loss compares their cosines with a scale of up to 100.
        x = self.fc(x)
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return x / x.norm(dim=-1, keepdim=True)


class Pooler(nn.Module):
    """Part of the released state dict that no path uses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)


class M2Encoder(nn.Module):
    """Bilingual image-text encoder. ``encode_image``, ``encode_text`` give the embeddings, ``forward`` both levels.

    ``layers`` decide whether widths are cut over ranks, ``part`` says which layers are here (m2_ds.model.pipeline).
    """

    logit_scale: nn.Parameter
    logit_vl_scale: nn.Parameter
    logit_bias: nn.Parameter
    logit_vl_bias: nn.Parameter
    itc_text_proj: "Head"
    itc_image_proj: "Head"
    itc_vl_text_proj: "Head"
    itc_vl_image_proj: "Head"
    masked_text_head: TextHead
    masked_image_head: ImageHead

    def __init__(self, config: M2EncoderConfig, layers: Layers = WHOLE, part: Part | None = None) -> None:
        super().__init__()
        self.config = config
        self.part = part = part or Part.whole(config)
        width = config.hidden_size
        self.backbone = Backbone(config, layers, part)
        numbers = part.layers(config.num_layers, config.num_vl_layers)
        self.backbone_vl = Encoder(config, layers, numbers, config.num_layers, part.is_last)
        if part.is_last:
            # [1] inside because DeepSpeed cannot broadcast 0-dim tensors on CPU; () in the state dict.
            for name in (*LOGIT_SCALES, *(LOGIT_BIASES if config.logit_bias else ())):
                self.register_parameter(name, nn.Parameter(torch.zeros(1)))
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.pooler = Pooler(width)
            for name in HEADS:
                self.add_module(name, Head(width, config.embed_dim))
            if config.masked_text_head:
                self.masked_text_head = TextHead(width, config.vocab_size, layers)
            if config.masked_image_head:
                self.masked_image_head = ImageHead(width, config.masked_image_head)
        register_canonical_names(self)

    # -- one modality ------------------------------------------------------------------------------------------------

    def image_hidden(self, images: Tensor, masked: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Backbone states [B, T, D] of pictures; with ``noise``, a share ``patch_drop`` of the patches is left out."""
        return self.patches_hidden(self.backbone.vision_embed(images, masked), noise)

    def patches_hidden(self, tokens: Tensor, noise: Noise | None = None) -> Tensor:
        """`image_hidden` of what `VisionEmbedding` gives, [B, P + 1, D]."""
        encoder = self.backbone.encoder
        x = encoder.add_positions(tokens, "A")
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
        return self._image_features(self.image_hidden(images, noise=noise), noise)

    def _image_features(self, hidden: Tensor, noise: Noise | None) -> Features:
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
        if len(ids) < len(images):
            if len(images) % len(ids):
                raise ValueError(f"{len(ids)} captions cannot be repeated for {len(images)} pictures")
            repeats = len(images) // len(ids)
            ids, mask = ids.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
        x = self.joint_tokens(self.backbone.vision_embed(images, masked), ids)
        patches = x.shape[1] - ids.shape[1]
        valid = torch.cat([mask.new_ones(len(x), patches), mask], dim=1).bool()
        return self.backbone.encoder(x, patches, valid, attention_mask=attention_mask)

    def joint_tokens(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """[B, P + 1 + L, D] of what `VisionEmbedding` gives, and captions, with their positions."""
        encoder = self.backbone.encoder
        text = encoder.add_positions(self.backbone.text_embed(ids), "B")
        return torch.cat([encoder.add_positions(tokens, "A"), text], dim=1)

    def fuse(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Vision-language states [B, P + 1 + L, D] of picture-caption pairs (text by the B branch)."""
        hidden = self.joint_hidden(images, ids, mask)
        split = hidden.shape[1] - ids.shape[1]
        valid = torch.cat([mask.new_ones(len(hidden), split), mask.expand(len(hidden), -1)], dim=1).bool()
        return self.backbone_vl(hidden, split, valid)

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        ids: Tensor,
        mask: Tensor,
        image_noise: Noise | None = None,
        text_noise: Noise | None = None,
        masked: MaskedInputs | None = None,
    ) -> Outputs:
        """Features of b pictures and n captions and, with ``masked``, what the masked objectives make of both."""
        tokens = self.backbone.vision_embed(images)
        hidden = self.patches_hidden(tokens, image_noise)
        image = self._image_features(hidden, image_noise)
        text = self.text_features(ids, mask, text_noise)
        sums = None
        if masked is not None:
            ids, valid = cut_to_longest(ids, mask)
            valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
            if masked.chooses:
                masked = masked.choose(self.itc_image_proj.each(hidden[:, 1:]), text.unimodal)
            split, noise = tokens.shape[1], joint_noise(text_noise, masked.objectives)
            x = self.enter_jointly(tokens, masked.ids(ids), masked.hidden_patches())
            valid = joint_valid(valid, split, masked.objectives)
            x = self.backbone_vl(self.backbone.encoder(x, split, valid, noise), split, valid, noise)
            sums = self.masked_sums(x, images, ids, masked)
        return Outputs(image, text, self.logit_parameters(), sums)

    def enter_jointly(self, tokens: Tensor, ids: Tensor, patches: Tensor | None) -> Tensor:
        """J sequences [J, P + 1 + L, D] of captions [J, L] and pictures' tokens [b, P + 1, D], ``patches`` hidden.

        Sequence j is of picture j modulo b.
        """
        tokens = tokens.repeat(len(ids) // len(tokens), 1, 1)
        if patches is not None:
            tokens = self.backbone.vision_embed.hide(tokens, patches)
        return self.joint_tokens(tokens, ids)

    def masked_sums(self, x: Tensor, images: Tensor, ids: Tensor, masked: MaskedInputs) -> MaskedSums:
        """From the joint sequences' last states [J, P + 1 + L, D], pictures [b, 3, S, S] and true ids [n, L]."""
        split, text, image, told, rebuilt = x.shape[1] - ids.shape[1], None, None, None, None
        if masked.words is not None:
            text, told = text_sums(self.masked_text_head, x[: len(ids), split:], ids, masked)
        if masked.patch_count:
            states = x[-len(ids) :, 1:split]
            image, rebuilt = image_sums(self.masked_image_head, states, images, masked, self.config.patch_size)
        return MaskedSums(text, image, told, rebuilt)

    def logit_parameters(self) -> LogitParameters:
        scale = (self.logit_scale * 1.0, self.logit_vl_scale * 1.0)
        bias = (self.logit_bias * 1.0, self.logit_vl_bias * 1.0) if self.config.logit_bias else None
        return LogitParameters(scale, bias)


def canonical_shapes(config: M2EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's whole tensors, in their order; nothing is allocated."""
    with torch.device("meta"):
        model = M2Encoder(config)
    return {
        piece.name: tuple(piece.tensor.shape)
        for name, parameter in model.named_parameters()
        for piece in pieces(name, parameter)
    }


def cut_to_longest(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Drop the columns that no caption of the batch uses; the mask as bool, or None where nothing is padded.

    Reads the mask on the host, which a GPU would wait for: batches of the stream are cut when they are built.
    """
    if mask.device.type != "cpu":
        return ids, mask.bool()
    lengths = mask.sum(dim=1)
    longest, shortest = int(lengths.max()), int(lengths.min())
    return ids[:, :longest], None if shortest == longest else mask[:, :longest].bool()


def kept_patches(patches: int, share: float) -> int:
    """How many of a picture's patches `drop_patches` leaves."""
    return max(1, round(patches * (1 - share)))


def drop_patches(x: Tensor, share: float, noise: Noise) -> Tensor:
    """FLIP (arXiv 2212.00794): keep the class token and a random 1 - ``share`` of the patches, in order."""
    patches = x.shape[1] - 1
    kept = kept_patches(patches, share)
    order = noise.uniform(_PATCH_DROP_DECISION, patches).argsort(dim=1)[:, :kept].sort(dim=1).values
    rows = order[..., None].expand(-1, -1, x.shape[2]) + 1
    return torch.cat([x[:, :1], x.gather(1, rows)], dim=1)
