"""Bytes that a forward leaves for its backward, tensor by tensor, as torch's autograd keeps them.

Every term names what keeps it; tests/plan/test_activations.py compares the sums with the storages that a real forward
keeps. Legend: N tokens that run, T tokens of a sequence, B samples, D width, F feed-forward width, H heads, r
tensor-parallel ranks, e bytes a number.
"""

from dataclasses import dataclass

from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import kept_patches
from m2_ds.model.stack import Part
from m2_ds.plan.joint import Joint, rank_vocabulary, rows_at_once
from m2_ds.plan.work import BYTES, Tokens, conv_stages


@dataclass(frozen=True)
class Graph:
    """``kept``: from forward to backward; ``working``: what backward has beside it at the most.

    That is gradients of one layer, and with recomputation its activations, which are made anew. Captions ran last, so
    that their part is given up before pictures' backward begins.
    """

    kept: float
    working: float


def part_graph(
    model: M2EncoderConfig, part: Part, of: list[Tokens], precision: str, on_cpu: bool, ranks: int = 1,
    sequence: bool = False,
) -> Graph:  # fmt: skip
    """Of a part of the model and one micro-batch: pictures and captions ``of``."""
    element = BYTES[precision]
    shape = _Shape(model, element, on_cpu and precision == "bf16", ranks, sequence)
    by_modality: list[tuple[float, float]] = []
    classes = part.is_last and model.num_vl_layers > 0 and not sequence
    for tokens in of:
        kept, working = 0.0, 0.0
        layers = [shape.layer(tokens)] * (part.end - part.start - classes)
        layers += [shape.last_layer(tokens)] * classes
        for whole in layers:
            stored, again = shape.recomputed(tokens, whole)
            kept += stored
            working = max(working, again + shape.backward(tokens))
        kept += shape.ends(tokens, part)
        if not part.is_first:
            kept += shape.received(tokens)
        by_modality.append((kept, working))
    inputs = shape.inputs(*of) if part.is_first else 0.0
    (pictures, of_pictures), (captions, of_captions) = by_modality
    return Graph(inputs + pictures + captions, max(of_captions, of_pictures - captions))


def joint_graph(
    model: M2EncoderConfig, part: Part, joint: Joint, precision: str, on_cpu: bool, ranks: int = 1
) -> Graph:
    """Of the joint sequences of a micro-batch, which run behind both: they are given up first."""
    element = BYTES[precision]
    shape = _Shape(model, element, on_cpu and precision == "bf16", ranks, sequence=False)
    of = joint.of
    whole = shape.layer(of)
    kept, again = shape.recomputed(of, whole)
    # Of the gradients of both branches' tokens each is as long as the sequence, before they are added.
    apart = 2 * of.tokens * model.hidden_size * element
    layers, padding = part.end - part.start, of.tokens * element
    working = again + shape.backward(of) + apart
    found = layers * kept + 2 * padding
    if part.is_first:
        found += joint.text.tokens * 8 + 2 * of.samples * joint.split * element
    else:
        found += shape.received(of)
    found += (part.has_backbone_end(model) + part.is_last) * (shape.residual(of) + 2 * of.tokens * 4)
    if part.is_last:
        of_heads, of_scores = shape.heads(joint)
        found, working = found + of_heads, max(working, of_scores)
    return Graph(found, working)


@dataclass(frozen=True)
class _Shape:
    model: M2EncoderConfig
    element: int
    wide_attention: bool  # on a CPU in bf16: fp32 copies of q, k and v (m2_ds.model.multiway.attend)
    ranks: int
    sequence: bool

    def residual(self, of: Tokens) -> float:
        """[N, D] as it lies between layers."""
        return of.tokens / (self.ranks if self.sequence else 1) * self.model.hidden_size * self.element

    def _cut(self, tokens: float, widths: float = 1.0, element: int | None = None) -> float:
        """[N, widths x D / r]"""
        return tokens * widths * self.model.hidden_size / self.ranks * (element or self.element)

    def _normed(self, of: Tokens) -> float:
        """A pre-norm's output, the input of a product: all tokens, or this rank's where it is gathered again."""
        return self.residual(of) if self.sequence else of.tokens * self.model.hidden_size * self.element

    def _statistics(self, rows: float) -> float:
        """Mean and deviation of the four norms."""
        return 4 * 2 * rows * 4

    def layer(self, of: Tokens) -> float:
        """All of a layer, its input included."""
        ffn = self.model.ffn_ratio
        attention = 4 if self.wide_attention else self.element
        kept = 2 * self.residual(of) + 2 * self._normed(of)  # inputs and outputs of the two pre-norms
        kept += self._cut(of.padded, 3, attention)  # q, k, v
        kept += self._cut(of.padded, 1, attention) + self._log_sums(of.samples, of.length)  # attention's output
        if of.packed or self.wide_attention:
            kept += self._cut(of.tokens)  # the same, packed or narrowed, for its norm
        if of.packed:
            kept += self._cut(of.tokens, 3)  # q, k, v as they ran: torch keeps what it copies into the padded tensor
        kept += self._cut(of.tokens)  # that norm's output, for the product
        kept += self._cut(of.tokens, 3 * ffn)  # before GELU, behind it, behind its norm
        return kept + self._statistics(of.tokens)

    def last_layer(self, of: Tokens) -> float:
        """Of class tokens alone, keys and values of all."""
        attention = 4 if self.wide_attention else self.element
        kept = self.residual(of) + self._normed(of)
        kept += self._cut(of.padded, 2, attention) + self._log_sums(of.samples, 1)
        if of.packed:
            kept += self._cut(of.tokens, 2)
        rows = of.samples
        kept += self._cut(rows, 2 + 2 + 3 * self.model.ffn_ratio) + 3 * rows * self.model.hidden_size * self.element
        return kept + self._statistics(rows) + 2 * of.tokens * 4

    def _log_sums(self, samples: int, queries: int) -> float:
        return samples * self.model.num_heads / self.ranks * queries * 4

    def recomputed(self, of: Tokens, whole: float) -> tuple[float, float]:
        """(kept, made again in backward) of a layer whose activations are ``whole`` without recomputation."""
        if self.model.recompute == "none":
            return whole, 0.0
        given = self.residual(of)
        if self.model.recompute == "full":
            return given, whole - given
        products = (
            self._cut(of.tokens, 3 + self.model.ffn_ratio) + 2 * of.tokens * self.model.hidden_size * self.element
        )
        if whole < products:  # class tokens alone: keys and values
            products = self._cut(of.tokens, 2)
        return given + products, whole - given

    def backward(self, of: Tokens) -> float:
        """Beside the layer's activations: gradients of the feed-forward's two widths, of its input and the residual's;
        or of q, k and v and what they were made of."""
        feed_forward = self._cut(of.tokens, 2 * self.model.ffn_ratio) + 2 * self.residual(of)
        attention = self._cut(of.padded, 4, 4 if self.wide_attention else self.element) + self._cut(of.padded, 3)
        return max(feed_forward, attention + 2 * self.residual(of))

    def ends(self, of: Tokens, part: Part) -> float:
        """Inputs of the final norms, and what heads keep: they look at the first token of a whole tensor."""
        model, width = self.model, self.model.hidden_size
        kept = 0.0
        whole = of.padded * width * self.element
        if part.has_backbone_end(model):
            kept += self.residual(of) + 2 * of.tokens * 4
            # Behind the norm it is padded, gathered or (on a GPU) masked for the vision-language layers, beside their
            # own input.
            if of.packed or of.masked:
                kept += whole + self.residual(of) * of.packed
            elif not model.num_vl_layers or not part.is_last:
                kept += whole
        if part.is_last:
            rows = of.samples * width * self.element
            if self.sequence:
                kept += self.residual(of) + whole
            elif model.num_vl_layers:
                kept += 2 * rows
            # Of both heads: the product, and in low precision its fp32 copy, and the vector of length 1.
            kept += 2 * of.samples * model.embed_dim * (4 + 4)
        return kept

    def inputs(self, pictures: Tokens, captions: Tokens) -> float:
        """What embeddings keep of pictures and captions."""
        model, element = self.model, self.element
        kept = 0.0
        if model.stem == "patch":
            kept += pictures.samples * 3 * model.image_size**2 * element
        else:
            kept += pictures.samples * 3 * model.image_size**2 * element
            for _, channels, side in conv_stages(model):
                # The convolution's output for the norm, the norm's for GELU, GELU's for the next.
                kept += pictures.samples * side * side * (3 * channels * element + 2 * 4)
        if model.patch_drop > 0:  # where the kept ones lie, int64 for each number
            kept += pictures.samples * kept_patches(model.num_patches, model.patch_drop) * model.hidden_size * 8
        return kept + captions.padded * 8

    def heads(self, joint: Joint) -> tuple[float, float]:
        """(kept, beside it in backward) of what tells hidden words and patches."""
        model, width = self.model, self.model.hidden_size
        kept = working = 0.0
        if joint.words:
            # Into the dense layer, GELU, the norm and the scores; that norm's statistics, the scores', places and ids.
            kept += joint.words * (4 * width * self.element + 2 * 4 + 3 * 4 + 4 * 8)
            vocabulary = rank_vocabulary(model, self.ranks)
            scores = rows_at_once(vocabulary, joint.words) * vocabulary * (4 if self.element == 4 else 4 + 2)
            working = scores + joint.words * width * self.element
        if joint.patches:
            kept += self.residual(joint.of)  # gathered from: the last norm's output
            kept += joint.patches * (4 * width * self.element + 2 * 4) + joint.captions * (joint.split - 1) * 8
            # Differences from pixels; or log-probabilities of codes.
            kept += joint.patches * model.masked_image_head * 4
            working = max(working, joint.patches * 2 * model.masked_image_head * 4 + self.residual(joint.of))
        return kept, working

    def received(self, of: Tokens) -> float:
        """A later stage's tokens, which its own work begins from: split and, where packed, copied."""
        return of.padded * self.model.hidden_size * self.element
