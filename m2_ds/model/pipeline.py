"""The model as stages of a pipeline: the same layers, run part by part.

A stage has both towers' layers i to j; the vision-language stack ends the pipe. What goes from one to the next is one
tensor of tokens (one message, one backward) and what the captions' masks and the random decisions need.
Legend: b pairs, C captions a picture, n = C b captions, J joint sequences, P patches that run, L text tokens, D width,
R rows.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import Features, LogitParameters, M2Encoder, Outputs, drop_patches, kept_patches
from m2_ds.model.layers import WHOLE, Layers
from m2_ds.model.masked import MaskedInputs, MaskedSums, joint_noise, joint_valid
from m2_ds.model.multiway import ALL_A, ALL_B
from m2_ds.model.random import Noise
from m2_ds.model.stack import Part


class Pictures(NamedTuple):
    """What the first stage takes: ``images`` [b, 3, S, S], ``ids`` and ``mask`` [n, L], random keys [b] and [n].

    And, where masked objectives ask for joint sequences, their captions ``joint_ids`` [J, L] and hidden patches uint8
    [J, P].
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    image_keys: Tensor
    text_keys: Tensor
    joint_ids: Tensor | None = None
    joint_patches: Tensor | None = None


class Tokens(NamedTuple):
    """What goes on: ``rows`` [R, D], and of the captions the ``mask`` [n, L]; keys as in `Pictures`.

    Rows are the pictures' tokens, the captions' tokens, behind the backbone's end its class tokens of both, and the
    tokens of joint sequences.
    """

    rows: Tensor
    mask: Tensor
    image_keys: Tensor
    text_keys: Tensor


class Asked(NamedTuple):
    """Of a micro-batch: what masked sums are made from, beside states (`M2Encoder.masked_sums`)."""

    images: Tensor
    ids: Tensor
    masked: MaskedInputs


def parts(config: M2EncoderConfig, layers_of_stages: list[int]) -> list[Part]:
    """The part of each stage, from the number of its layers. Raises ValueError where they are not the model's."""
    depth = config.num_layers + config.num_vl_layers
    if sum(layers_of_stages) != depth or min(layers_of_stages) < 1:
        raise ValueError(
            f"stages of {layers_of_stages} layers hold {sum(layers_of_stages)}; the model has {depth}, and every stage "
            "needs one"
        )
    ends = [sum(layers_of_stages[: i + 1]) for i in range(len(layers_of_stages))]
    return [
        Part(end - count, end, is_first=end == count, is_last=end == depth)
        for count, end in zip(layers_of_stages, ends)
    ]


class Stage(nn.Module):
    """One stage. ``model`` is the part of an M2Encoder with the canonical names.

    ``unimodal``: the loss looks at the backbone's own features, too.
    """

    def __init__(self, config: M2EncoderConfig, part: Part, layers: Layers = WHOLE, unimodal: bool = True) -> None:
        super().__init__()
        self.model = M2Encoder(config, layers, part)
        self.config, self.part, self.unimodal = config, part, unimodal
        self.ends_backbone = part.has_backbone_end(config)
        self.objectives = config.masked_text_head + (config.masked_image_head > 0)
        # On the last stage, what the next micro-batches' masked sums are made from: it never passes through the others.
        self.asked: deque[Asked] = deque()
        self.sums: list[MaskedSums] = []

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        """`Pictures` or `Tokens` -> `Tokens`, or on the last stage features and logit parameters, one after another:

        unimodal pictures [b, E] and captions [n, E] (not without ``unimodal``), vl ones, the two scales [1], biases,
        and the sums [1] of masked objectives, which are put to ``sums``, too.
        """
        image, text, class_tokens, joint, mask, keys = self._enter(inputs)
        valid = mask.bool()
        image, image_class = self.image_layers(image, Noise(keys[0]))
        text, text_class = self.text_layers(text, valid, Noise(keys[1]))
        if joint is not None:
            joint = self._joint_layers(joint, valid, Noise(keys[1]))
        if image_class is not None and text_class is not None:
            class_tokens = torch.cat([image_class, text_class])
        if not self.part.is_last:
            rows = [image.flatten(0, 1), text.flatten(0, 1)]
            rows += [] if class_tokens is None else [class_tokens]
            rows += [] if joint is None else [joint.flatten(0, 1)]
            return tuple(Tokens(torch.cat(rows), mask, *keys))
        features = self._features(image, text, class_tokens)
        if joint is None:
            return features
        sums = self.model.masked_sums(joint, *self.asked.popleft())
        self.sums.append(sums.detach())
        return (*features, *sums.tensors())

    # -- one modality ------------------------------------------------------------------------------------------------

    def image_tokens(self, images: Tensor, noise: Noise | None = None) -> Tensor:
        """[b, 3, S, S] -> [b, P + 1, D]; on the first stage."""
        return self._with_positions(self.model.backbone.vision_embed(images), noise)

    def _with_positions(self, tokens: Tensor, noise: Noise | None) -> Tensor:
        x = self.model.backbone.encoder.add_positions(tokens, "A")
        return x if noise is None or self.config.patch_drop == 0 else drop_patches(x, self.config.patch_drop, noise)

    def text_tokens(self, ids: Tensor) -> Tensor:
        """[n, L] -> [n, L, D]; on the first stage."""
        return self.model.backbone.encoder.add_positions(self.model.backbone.text_embed(ids), "B")

    def image_layers(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor | None]:
        """Through this stage's layers, and the backbone's class tokens [b, D] where it ends and they are wanted."""
        return self._layers(x, ALL_A, None, noise)

    def text_layers(self, x: Tensor, valid: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor | None]:
        return self._layers(x, ALL_B, valid, noise)

    def _layers(self, x: Tensor, split: int, valid: Tensor | None, noise: Noise | None) -> tuple[Tensor, Tensor | None]:
        backbone, vl, class_tokens = self.model.backbone.encoder, self.model.backbone_vl, None
        if len(backbone.layers) or self.ends_backbone:
            x = backbone(x, split, valid, noise)
        if self.ends_backbone and self.unimodal:
            class_tokens = x[:, 0]
        if len(vl.layers) or self.part.is_last:
            x = vl(x, ALL_A, valid, noise, first_only=self.part.is_last)
        return x, class_tokens

    def _joint_layers(self, x: Tensor, valid: Tensor, noise: Noise) -> Tensor:
        backbone, vl, split = self.model.backbone.encoder, self.model.backbone_vl, self.config.num_patches + 1
        valid, own_noise = joint_valid(valid, split, self.objectives), joint_noise(noise, self.objectives)
        if len(backbone.layers) or self.ends_backbone:
            x = backbone(x, split, valid, own_noise)
        if len(vl.layers) or self.part.is_last:
            x = vl(x, split, valid, own_noise)
        return x

    # -- what comes in and goes out ----------------------------------------------------------------------------------

    def _enter(
        self, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, list[Tensor]]:
        """Tokens of pictures [b, P + 1, D], captions [n, L, D], class tokens [b + n, D], joint ones; mask and keys."""
        model = self.model
        if self.part.is_first:
            given = Pictures(*inputs)
            keys = [given.image_keys, given.text_keys]
            tokens, noise = model.backbone.vision_embed(given.images), Noise(given.image_keys)
            joint = None
            if given.joint_ids is not None:
                assert given.joint_patches is not None
                hidden = given.joint_patches.bool() if self.config.masked_image_head else None
                joint = model.enter_jointly(tokens, given.joint_ids, hidden)
            return self._with_positions(tokens, noise), self.text_tokens(given.ids), None, joint, given.mask, keys
        came = Tokens(*inputs)
        (n, length), b = came.mask.shape, len(came.image_keys)
        picture = 1 + kept_patches(self.config.num_patches, self.config.patch_drop)
        carried = b + n if self.unimodal and self.part.start >= self.config.num_layers else 0
        sizes = [b * picture, n * length, carried]
        image, text, class_tokens, rest = came.rows.split([*sizes, len(came.rows) - sum(sizes)])
        return (
            image.unflatten(0, (b, picture)),
            text.unflatten(0, (n, length)),
            class_tokens if carried else None,
            rest.unflatten(0, (self.objectives * n, -1)) if len(rest) else None,
            came.mask,
            [came.image_keys, came.text_keys],
        )

    def _features(self, image: Tensor, text: Tensor, class_tokens: Tensor | None) -> tuple[Tensor, ...]:
        model = self.model
        features = [model.itc_vl_image_proj(image), model.itc_vl_text_proj(text)]
        if class_tokens is not None:
            of_image, of_text = class_tokens[:, None].split([len(image), len(text)])
            features = [model.itc_image_proj(of_image), model.itc_text_proj(of_text), *features]
        logits = model.logit_parameters()
        return (*features, *logits.scale, *(logits.bias or ()))


def features_of(outputs: Sequence[Tensor], unimodal: bool) -> Outputs:
    """The last stage's outputs without masked sums as `M2Encoder.forward` gives them; a level not computed is empty."""
    outputs = list(outputs) if unimodal else [*(x[:0] for x in outputs[:2]), *outputs]
    image, text, vl_image, vl_text, scale, vl_scale, *bias = outputs
    logits = LogitParameters((scale, vl_scale), (bias[0], bias[1]) if bias else None)
    return Outputs(Features(image, vl_image), Features(text, vl_text), logits, None)
