"""What masked objectives add to a micro-batch: joint sequences of pictures and captions, and heads at hidden places.

They run in the forward that has a backward, once a micro-batch: the forward-only first pass leaves them out
(m2_ds.engine.passes). Legend: b pairs, C captions a picture, n = C b, J joint sequences (n for each objective), P
patches, L text tokens, T = P + 1 + L, R hidden tokens, H hidden patches of all captions, D width, V vocabulary, E
embedding, r tensor-parallel ranks, e bytes a number.
"""

from dataclasses import dataclass

from m2_ds.config import RunConfig
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.masking import hidden_count
from m2_ds.model.stack import Part
from m2_ds.parallel.rows import LEAST_ROWS, SCORES
from m2_ds.plan.layout import Load
from m2_ds.plan.work import Tokens, Work, layer_work

ENDS = 2  # tokens of a caption that are never hidden: its start and its end
# Weights are applied to the two branches' tokens apart, which are copied out of the sequence and joined again: around
# both norms (4 each), q, k and v (8), the inner norm, the product behind it and the feed-forward. In units of N D e.
_APART = 28
# Bytes of a score that are read and written: made, looked at, widened into exponentials, summed; and in backward.
_SCORE, _SCORE_BACKWARD = 24.0, 28.0


@dataclass(frozen=True)
class Joint:
    """Of a micro-batch. ``of``: the J sequences of T tokens, padding and all; ``split`` of a sequence's tokens are its
    picture's. ``words``: R, on average; ``patches``: H. Without an objective its number is 0."""

    of: Tokens
    split: int
    pairs: int
    captions: int
    words: float
    patches: int
    attentive: bool

    @property
    def text(self) -> Tokens:
        """Their captions alone."""
        samples, length = self.of.samples, self.of.length - self.split
        return Tokens(samples, length, samples * length)


def joint_of(config: RunConfig, load: Load, pairs: int) -> Joint | None:
    """Of ``pairs`` pairs; None without masked objectives."""
    loss, model = config.loss, config.model
    objectives = (loss.cmlm.weight > 0) + (loss.cmim.weight > 0)
    if not objectives:
        return None
    captions, split = pairs * load.captions, model.num_patches + 1
    samples, length = objectives * captions, split + load.length
    words = captions * max(1.0, loss.cmlm.share * (load.mean_length - ENDS)) if loss.cmlm.weight else 0.0
    patches = captions * hidden_count(model.num_patches, loss.cmim.share) if loss.cmim.weight else 0
    attentive = loss.cmim.weight > 0 and loss.cmim.choose == "attentive"
    tokens = Tokens(samples, length, samples * length, masked=True)
    return Joint(tokens, split, pairs, captions, words, patches, attentive)


def rows_at_once(vocabulary: int, words: float) -> float:
    """Hidden tokens whose scores, over a rank's share of the vocabulary, exist at a time (m2_ds.parallel.rows)."""
    return min(words, max(LEAST_ROWS, SCORES // vocabulary))


def rank_vocabulary(model: M2EncoderConfig, ranks: int) -> int:
    """Tokens that a rank scores: rounded up."""
    return -(-model.vocab_size // ranks)


def joint_work(model: M2EncoderConfig, part: Part, joint: Joint, element: int, ranks: int = 1) -> Work:
    """The forward of a part of the model, without the heads."""
    of, width = joint.of, model.hidden_size
    found = Work(0, 3.0 * of.tokens * width * element, 3.0 * of.tokens * width * element)  # padding is zeroed
    apart = float(_APART * of.tokens * width * element)
    layer = layer_work(model, of, element, ranks) + Work(0, apart, 2 * apart, 1)
    for _ in range(part.end - part.start):
        found += layer
    if part.is_first:  # pictures' tokens are repeated and hidden, captions looked up, positions added, both joined
        rows = float(of.tokens * width * element)
        table = model.vocab_size / ranks * width * element
        found += Work(0, 8 * rows, 8 * rows + 2 * table, 2)
    return found


def head_work(model: M2EncoderConfig, part: Part, joint: Joint, element: int, ranks: int = 1) -> Work:
    """The forward of the heads. What backward scores again is not in it (`scores_again`)."""
    if not part.is_last:
        return Work()
    return _text_head(model, joint, element, ranks) + _image_head(model, joint, element)


def scores_again(model: M2EncoderConfig, part: Part, joint: Joint, ranks: int = 1) -> Work:
    """What backward repeats of the heads' forward: products that make scores."""
    scores = joint.words * rank_vocabulary(model, ranks)
    return Work(2 * scores * model.hidden_size) if part.is_last else Work()


def _text_head(model: M2EncoderConfig, joint: Joint, element: int, ranks: int) -> Work:
    """Dense layer, GELU and norm of hidden tokens, then their scores; every part of these adds to the weight's whole
    gradient."""
    if not joint.words:
        return Work()
    width, vocabulary = model.hidden_size, rank_vocabulary(model, ranks)
    scores = joint.words * vocabulary
    parts = joint.words / rows_at_once(vocabulary, joint.words)
    gradient = (2 * parts + 1) * vocabulary * width * element
    states = 8.0 * joint.words * width * element
    return Work(
        2 * width * (width * joint.words + scores),
        states + _SCORE * scores,
        2 * states + _SCORE_BACKWARD * scores + gradient,
        1,
    )


def _image_head(model: M2EncoderConfig, joint: Joint, element: int) -> Work:
    """The same for hidden patches, whole on every rank; and, where patches are chosen, their and captions' cosines."""
    if not joint.patches:
        return Work()
    width, outputs = model.hidden_size, model.masked_image_head
    states, found = 8.0 * joint.patches * width * element, 4.0 * joint.patches * outputs
    work = Work(2 * joint.patches * width * (width + outputs), states + 6 * found, 2 * states + 4 * found, 1)
    if joint.attentive:
        embed, patches = model.embed_dim, joint.split - 1
        moved = joint.pairs * patches * (2 * width * element + 4 * 4 * embed)
        work += Work(2 * embed * patches * (joint.pairs * width + joint.captions), moved, 0, 1)
    return work
