"""The shape of an M2-Encoder: one frozen configuration, the released sizes as presets, the release's JSON as input."""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from m2_ds.schema import Settings

RecomputePolicy = Literal["none", "selective", "full"]


class M2EncoderConfig(Settings):
    """Architecture and training-time regularisation of one model. Defaults are those of the released 0.4B model."""

    hidden_size: int = Field(768, gt=0, description="width D of both towers")
    num_heads: int = Field(12, gt=0, description="attention heads; D must be a multiple")
    num_layers: int = Field(9, ge=0, description="backbone layers, each with a vision (A) and a text (B) branch")
    num_vl_layers: int = Field(3, ge=0, description="vision-language layers after the backbone")
    embed_dim: int = Field(768, gt=0, description="size E of the embeddings")
    image_size: int = Field(224, gt=0, description="side S of the square picture, pixels")
    patch_size: int = Field(16, gt=0, description="side of a patch, pixels; S must be a multiple")
    max_text_length: int = Field(52, gt=1, description="tokens of a caption, the class token and the end included")
    text_positions: int = Field(1024, gt=3, description="rows of the text position table; two are never read")
    vocab_size: int = Field(115244, gt=0, description="rows of the token table")
    ffn_ratio: float = Field(4.0, gt=0, description="feed-forward width as a multiple of D")
    stem: Literal["patch", "conv"] = Field(
        "patch", description="patch: the release's linear patches; conv: a stack of 3x3 convolutions to the same grid"
    )
    stem_width: int = Field(32, gt=0, description="channels of the conv stem's first stage; doubled at each halving")
    stem_depth: int = Field(1, gt=0, description="3x3 convolutions a stage of the conv stem; residual from the second")
    stem_full_width: int = Field(
        0, ge=0, description="channels of one more convolution, at full resolution, before the stages; 0: none"
    )
    logit_bias: bool = Field(
        False, description="a learned offset of the logits at each level (SigLIP's), for loss.form sigmoid"
    )
    masked_text_head: bool = Field(False, description="a head that tells hidden words (loss.cmlm); no released part")
    masked_image_head: int = Field(
        0, ge=0, description="outputs a patch of a head that tells hidden patches (loss.cmim); 0: none, as released"
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last layer, rising from 0; training")
    patch_drop: float = Field(0.0, ge=0, lt=1, description="share of patches left out of a training forward (FLIP)")
    position_std: float = Field(
        1.0,
        gt=0,
        description="standard deviation of the position tables' initial values; the reference draws from N(0, 1)",
    )
    patch_position_std: float | None = Field(
        None,
        gt=0,
        description="the same of pictures' positions alone; None: as position_std. 1 suits a stem that is fitted to "
        "pictures (init_pictures), whose tokens have a variance of 1",
    )
    recompute: RecomputePolicy = Field(
        "none", description="activation checkpointing: none, selective (keep matrix products), full (keep layer inputs)"
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; "
                f"choose one of {[h for h in range(1, 65) if self.hidden_size % h == 0]}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.max_text_length > self.text_positions - 2:
            raise ValueError(
                f"max_text_length {self.max_text_length} needs text_positions >= {self.max_text_length + 2}, "
                f"not {self.text_positions} (rows 0 and 1 are never read)"
            )
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"stem conv halves the picture at each stage: patch_size {self.patch_size} must be 2^n")
        return self

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers of a patch's pixels."""
        return 3 * self.patch_size**2

    def without_masked_heads(self) -> "M2EncoderConfig":
        """The released network alone."""
        return self.model_copy(update={"masked_text_head": False, "masked_image_head": 0})

    @property
    def ffn_size(self) -> int:
        return int(self.ffn_ratio * self.hidden_size)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "M2EncoderConfig":
        """A named size with fields changed, e.g. ``preset("1b", image_size=384)``; ValueError on unknown names."""
        if name not in PRESETS:
            raise ValueError(f"unknown model preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_release(cls, config: Mapping[str, Any]) -> "M2EncoderConfig":
        """The configuration that a JSON file of the reference release describes (its defaults filled in)."""
        version = config.get("beit_version", "base")
        if version not in _RELEASE_HEADS:
            raise ValueError(f"beit_version is {version!r}; the release knows {', '.join(_RELEASE_HEADS)}")
        width, heads, layers = _RELEASE_HEADS[version]
        width = config.get("encoder_embed_dim", width)
        return cls(
            hidden_size=width,
            num_heads=config.get("encoder_attention_heads", heads),
            num_layers=config.get("encoder_layers", layers),
            num_vl_layers=config.get("beit3_vl_layers", 3),
            embed_dim=config.get("out_embed_dim", 768),
            image_size=config.get("image_size", 224),
            patch_size=config.get("patch_size", 16),
            max_text_length=config.get("max_text_len", 52),
            vocab_size=config.get("vocab_size", 115244),
        )


class LoraConfig(Settings):
    """Low-rank adapters (arXiv 2106.09685) beside frozen weights: W x + (alpha / rank) B A x, trained are A and B."""

    rank: int = Field(8, gt=0, description="rows of A and columns of B; q, k and v of a branch share one A")
    alpha: float = Field(16.0, gt=0, description="the adapter's output is multiplied by alpha / rank")
    pattern: str = Field(
        r"\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj\.[AB]|ffn\.[AB]\.fc[12])$",
        description="regular expression, searched in canonical names of linear layers (those of weights, without "
        ".weight); those that it finds are adapted",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="only 0: see the error that another value gives")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return checked_pattern(pattern)

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout > 0:
            raise ValueError(
                "a step's second pass must repeat its first, and dropout between A and B would not: set it to 0, and "
                "model.drop_path or optim.weight_decay against overfitting"
            )
        return dropout


def checked_pattern(pattern: str) -> str:
    """A regular expression that compiles; ValueError otherwise."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


# What `beit_version` stands for where a release config leaves a field out: width, heads, backbone layers.
_RELEASE_HEADS = {"base": (768, 12, 9), "large": (1024, 16, 21), "huge": (4096, 32, 21)}

_TINY = {"text_positions": 130, "vocab_size": 16000, "max_text_length": 32}

PRESETS: dict[str, dict[str, Any]] = {
    "0.4b": {},
    "1b": {"hidden_size": 1024, "num_heads": 16, "num_layers": 21, "embed_dim": 1024},
    "10b": {"hidden_size": 4096, "num_heads": 32, "num_layers": 21, "embed_dim": 1024},
    "tiny": {
        **_TINY,
        "hidden_size": 192,
        "num_heads": 3,
        "num_layers": 6,
        "num_vl_layers": 2,
        "embed_dim": 192,
        "image_size": 48,
        "patch_size": 8,
    },
    "test": {
        **_TINY,
        "hidden_size": 32,
        "num_heads": 4,
        "num_layers": 2,
        "num_vl_layers": 1,
        "embed_dim": 32,
        "image_size": 32,
        "patch_size": 8,
        "vocab_size": 600,
    },
}
