"""The M2-Encoder as a model of transformers. The network is m2_ds.model's; only how its weights are kept differs.

transformers fills a model weight by weight, by the names in its files. So q, k and v, which the network computes in one
product, are weights of their own here, and the logit scales have no axis: both as the release's files have them.

Legend: B pictures or captions, S image side, L tokens, E embedding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from m2_ds.convert.hugging_face.configuration_m2_encoder import M2EncoderConfig
from m2_ds.model.config import M2EncoderConfig as NetworkConfig
from m2_ds.model.encoder import Backbone, M2Encoder
from m2_ds.model.layers import WHOLE
from m2_ds.model.multiway import Attention, Multiway
from m2_ds.model.weights import init_weights


class SeparateAttention(Attention):
    """`Attention` whose q, k and v are weights of their own."""

    q_proj: Multiway
    k_proj: Multiway
    v_proj: Multiway

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config, WHOLE)
        width = config.hidden_size
        del self._modules["qkv_proj"]  # a method here
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, Multiway(lambda: WHOLE.column(width, width)))

    def qkv_proj(self, x: Tensor, split: int, queries: Tensor | None = None) -> Any:  # type: ignore[override]
        """q, k and v side by side [..., 3 D] of x [..., D]; with ``queries``, their q and k and v of x."""
        q = self.q_proj(x if queries is None else queries, split)
        k, v = self.k_proj(x, split), self.v_proj(x, split)
        return torch.cat([q, k, v], dim=-1) if queries is None else (q, torch.cat([k, v], dim=-1))


@dataclass
class M2EncoderOutput(ModelOutput):
    """Scores [B images, B captions], their transpose, unit embeddings [B, E], and the loss where it was asked for."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class M2EncoderModel(PreTrainedModel):
    """Bilingual image-text encoder. Weights have the release's names, so the files of a canonical folder are read."""

    config_class = M2EncoderConfig
    base_model_prefix = "m2_encoder"
    main_input_name = "pixel_values"
    input_modalities: Any = ("image", "text")
    backbone: Backbone
    logit_scale: nn.Parameter
    _supports_sdpa = True
    _no_split_modules = ["MultiwayLayer", "VisionEmbedding"]

    # The network's own paths over the same parts; docstrings in m2_ds.model.encoder.
    image_hidden: Any = M2Encoder.image_hidden
    text_hidden: Any = M2Encoder.text_hidden
    patches_hidden: Any = M2Encoder.patches_hidden
    joint_hidden: Any = M2Encoder.joint_hidden
    joint_tokens: Any = M2Encoder.joint_tokens
    _image_features: Any = M2Encoder._image_features
    image_features: Any = M2Encoder.image_features
    text_features: Any = M2Encoder.text_features
    encode_image: Any = M2Encoder.encode_image
    encode_text: Any = M2Encoder.encode_text
    fuse: Any = M2Encoder.fuse

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__(config)
        if config._attn_implementation not in (None, "sdpa"):
            raise ValueError(
                f"attn_implementation is {config._attn_implementation!r}: attention is torch's own "
                "scaled_dot_product_attention; leave it out or say 'sdpa'"
            )
        network = config.network()
        encoder = M2Encoder(network)
        for stack in (encoder.backbone.encoder, encoder.backbone_vl):
            for layer in stack.layers.values():
                layer.self_attn = SeparateAttention(network)
        for name, part in encoder.named_children():
            self.add_module(name, part)
        for name, _ in encoder.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(torch.zeros(())))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As the library's, but weights that are not in the files are refused instead of drawn at random."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, told = loaded
        if missing := sorted(told["missing_keys"]):
            raise ValueError(
                f"{args[0] if args else kwargs.get('pretrained_model_name_or_path')} lacks {len(missing)} weights of "
                f"this model: {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}"
            )
        return (model, told) if output_loading_info else model

    def initialize_weights(self) -> None:
        """A new model's weights, as the release draws them, from torch's global generator."""
        # Those of a model that is being filled from files carry a mark.
        if any(getattr(p, "_is_hf_initialized", False) for p in self.parameters()):
            return
        init_weights(self, self.config.network(), seed=int(torch.randint(2**31, ())))

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.text_embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.text_embed = value

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Unit vectors [B, E] of pictures [B, 3, S, S], float in [0, 1] or uint8: what the scores are made of."""
        return self.encode_image(pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit vectors [B, E] of captions int64 [B, L]; mask 1 token, 0 padding (on the right), None: no padding."""
        return self.encode_text(input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
    ) -> M2EncoderOutput | tuple[Tensor, ...]:
        """Scores of every picture with every caption, as the release has them: exp(logit_scale) times the cosine.

        A model's logit bias moves all scores alike and is left out. ``return_loss``: the i-th caption belongs to the
        i-th picture; mean of the cross-entropies in both directions. Raises ValueError where one side is missing.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError(
                "scores need input_ids and pixel_values; for one of them alone call get_text_features or "
                "get_image_features"
            )
        image, text = self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)
        # Embeddings of a half-precision model are fp32; so is the scale that multiplies them.
        logits = self.logit_scale.to(image.dtype).exp() * image @ text.to(image.device).T
        loss = None
        if return_loss:
            if len(image) != len(text):
                raise ValueError(f"return_loss needs pairs; there are {len(image)} pictures and {len(text)} captions")
            pairs = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        found = M2EncoderOutput(loss, logits, logits.T, text, image)
        return found if (self.config.return_dict if return_dict is None else return_dict) else found.to_tuple()
