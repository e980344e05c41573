"""Bytes that tensor parallelism sends, by formula; what is counted equals it to the byte (tests/plan).

A rank's bytes on a ring of r ranks: an all-reduce of x bytes sends 2 (r - 1) / r x, an all-gather to x bytes or a
reduce-scatter of x bytes half of that. Legend: N tokens that run, D width, e bytes a number, b samples; a "sum" is the
all-reduce of N D e bytes.

- A layer begins with a column-cut product (q, k, v; fc1) twice and ends it with a row-cut one (out_proj; fc2). Forward
  sums the two outputs, backward the gradients of the two inputs: 2 + 2 sums a modality.
- Its two sub-LayerNorms are over the cut width: two fp32 numbers a token in forward and two in backward each.
- The last vision-language layer computes b class tokens alone: its outputs are b tokens, in backward the gradients of
  the class tokens' queries, of all tokens' keys and values and of fc1's input are summed: N + 2 b.
- The token table is cut by rows: forward sums the captions' tokens, padding included; backward needs nothing.
- Sequence parallel: a gather before and a scatter behind each pair of products are half a sum each, so forward sends
  the same. Backward scatters inputs' gradients and gathers outputs', and gathers the inputs again instead of keeping
  them: 2 + 1 sums. What every rank holds whole and applies to its own tokens (2 norms, 2 biases: 6 D numbers) sums its
  gradients. Each stack gathers its tokens at its end and, in backward, at its beginning, and its final norm has 2 D
  numbers more. The last layer computes all tokens.
- A joint layer (m2_ds.plan.joint) sends as much a token, in twice as many messages: for its two branches apart.
- Scores of R hidden tokens over a vocabulary that is cut: forward gathers three fp32 numbers a token, backward sums
  their states' gradients, R D e bytes.
- Recomputation repeats a layer's forward without its last collective: nothing behind it is needed for backward (with
  stochastic depth something is): of a joint layer that is the captions' branch, the last.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.stack import Part
from m2_ds.plan.joint import Joint
from m2_ds.plan.work import BYTES, Tokens


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends for a micro-batch, sub-LayerNorms apart."""

    forward: float = 0.0
    backward: float = 0.0
    norms_forward: float = 0.0
    norms_backward: float = 0.0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(*(x + y for x, y in zip(astuple(self), astuple(other))))

    @property
    def norms_share(self) -> float:
        norms = self.norms_forward + self.norms_backward
        return norms / (norms + self.forward + self.backward)


def layer_bytes(
    tokens: int, width: int, ranks: int, element: int, sequence: bool, again: bool, classes: int | None = None,
    last: int | None = None,
) -> Sent:  # fmt: skip
    """Of one modality in one layer; ``again``: with recomputation, ``classes``: those alone, ``last``: tokens of the
    last collective, by default all."""
    ring = 2 * (ranks - 1) / ranks
    if classes is not None and not sequence:
        total, forward, backward = classes, 2 * classes, tokens + 2 * classes
    else:
        total, forward, backward = tokens, 2 * tokens, (3 if sequence else 2) * tokens
    last = total if last is None else last
    repeated = forward - (last / 2 if sequence else last) if again else 0.0
    whole = 6 if sequence else 0
    norms = ring * 2 * 2 * 4 * total
    return Sent(
        ring * forward * width * element,
        ring * (backward + repeated + whole) * width * element,
        norms,
        norms * (2 if again else 1),
    )


def part_bytes(
    model: M2EncoderConfig, part: Part, of: Sequence[Tokens], ranks: int, precision: str, sequence: bool
) -> Sent:
    """Of a forward and backward of pictures and captions ``of`` through a part of the model."""
    width, element, ring = model.hidden_size, BYTES[precision], 2 * (ranks - 1) / ranks
    found = Sent()
    if part.is_first:
        found += Sent(ring * of[1].padded * width * element)
    again = model.recompute != "none"
    classes = part.is_last and model.num_vl_layers > 0
    backbone = len(part.layers(0, model.num_layers)) > 0 or part.has_backbone_end(model)
    behind = len(part.layers(model.num_layers, model.num_vl_layers)) > 0 or part.is_last
    stacks = int(backbone) + int(behind)
    norms = part.has_backbone_end(model) + part.is_last
    for tokens in of:
        full = layer_bytes(tokens.tokens, width, ranks, element, sequence, again)
        for _ in range(part.end - part.start - classes):
            found += full
        if classes:
            found += layer_bytes(tokens.tokens, width, ranks, element, sequence, again, tokens.samples)
        if sequence:
            once = ring / 2 * tokens.tokens * width * element
            found += Sent(stacks * once, stacks * once + norms * ring * 2 * width * element)
    return found


def joint_bytes(model: M2EncoderConfig, part: Part, joint: Joint, ranks: int, precision: str) -> Sent:
    """Of a forward and backward of joint sequences, and of the scores behind them."""
    width, element, ring = model.hidden_size, BYTES[precision], 2 * (ranks - 1) / ranks
    text, again = joint.text.tokens, model.recompute != "none"
    layer = layer_bytes(joint.of.tokens, width, ranks, element, False, again, last=text)
    found = Sent(ring * text * width * element) if part.is_first else Sent()
    for _ in range(part.end - part.start):
        found += layer
    if part.is_last:
        found += Sent((ranks - 1) * 3 * 4 * joint.words, ring * joint.words * width * element)
    return found
