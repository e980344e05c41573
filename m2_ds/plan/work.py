"""What a rank computes for a micro-batch, counted from shapes: operations of products and attention, bytes of the rest.

Legend: b pairs, N tokens that run, T tokens of a sequence, D width, F feed-forward width, H heads, E embedding, P
patches, S image side, p patch side, r tensor-parallel ranks, e bytes a number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import kept_patches
from m2_ds.model.stack import Part
from m2_ds.plan.layout import Load

BYTES = {"fp32": 4, "bf16": 2}
# Bytes that a layer reads and writes beside its products, forward, in units of N D e, where widths are whole: two norms
# (2 each) and two residuals (3 each). Backward twice as many. GELU and the sub-LayerNorms act on widths that are cut.
_WHOLE = 2 + 2 + 3 + 3
# A LayerNorm over a cut width is made of single operations in fp32: bytes a number, forward and backward.
_SPLIT_NORM = (40.0, 100.0)
PACKED = 128  # packed captions are rounded up to this many tokens (m2_ds.model.multiway.Packing)


@dataclass(frozen=True)
class Tokens:
    """Of one modality in a micro-batch. ``tokens`` run in products and norms; attention sees ``samples`` x ``length``.

    ``packed``: they are two different tensors; ``masked``: padding runs, zeroed where a stack begins.
    """

    samples: int
    length: int
    tokens: int
    packed: bool = False
    masked: bool = False

    @property
    def padded(self) -> int:
        return self.samples * self.length


def tokens_of(model: M2EncoderConfig, load: Load, pairs: int, on_cpu: bool, sequence_ranks: int = 1) -> list[Tokens]:
    """Pictures and captions of ``pairs`` pairs."""
    picture = 1 + kept_patches(model.num_patches, model.patch_drop)
    captions = pairs * load.captions
    found = [Tokens(pairs, picture, pairs * picture)]
    if on_cpu and load.mean_length < load.length:
        run = round(captions * load.mean_length)
        multiple = math.lcm(PACKED, sequence_ranks)
        return [_cut(found[0], sequence_ranks), Tokens(captions, load.length, run + -run % multiple, packed=True)]
    found.append(Tokens(captions, load.length, captions * load.length, masked=not on_cpu))
    return [_cut(tokens, sequence_ranks) for tokens in found]


def _cut(tokens: Tokens, ranks: int) -> Tokens:
    """Under sequence parallelism sequences run packed, and the ranks divide their tokens."""
    if ranks == 1:
        return tokens
    run = tokens.tokens + -tokens.tokens % ranks
    return Tokens(tokens.samples, tokens.length, run, packed=True, masked=tokens.masked)


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one rank; ``launches``: layers times modalities; ``attention``: operations by length."""

    products: float = 0.0
    pointwise: float = 0.0
    pointwise_backward: float = 0.0
    launches: float = 0.0
    attention: Mapping[int, float] = field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        lengths = {**self.attention, **other.attention}
        return Work(
            self.products + other.products,
            self.pointwise + other.pointwise,
            self.pointwise_backward + other.pointwise_backward,
            self.launches + other.launches,
            {length: self.attention.get(length, 0.0) + other.attention.get(length, 0.0) for length in lengths},
        )

    @property
    def operations(self) -> float:
        return self.products + sum(self.attention.values())


def layer_work(
    model: M2EncoderConfig, of: Tokens, element: int, ranks: int = 1, sequence: bool = False, first_only: bool = False
) -> Work:
    """A layer's forward for one modality; ``first_only``: of class tokens alone, from keys and values of all."""
    width, ffn = model.hidden_size, model.ffn_size
    rows, queries = of.tokens, of.samples if first_only else of.tokens
    products = 2 * width * (2 * width * rows + (2 * width + 2 * ffn) * queries)
    attention = 4 * of.samples * of.length * (1 if first_only else of.length) * width
    whole = float(2 * rows + (_WHOLE - 2) * queries) * width * element
    gelu = 2.0 * ffn * element * queries
    norms = float(queries * (width + ffn))  # numbers of the two sub-LayerNorms
    if ranks == 1:
        cut = gelu + 2 * norms * element
        return Work(products, whole + cut, 2 * (whole + cut), 1, {of.length: attention})
    whole += 4.0 * queries * width * element  # each of two sums is of a copy, and has its bias added by itself
    share = ranks if sequence else 1
    return Work(
        products / ranks,
        whole / share + (gelu + norms * _SPLIT_NORM[0]) / ranks,
        2 * whole / share + (2 * gelu + norms * _SPLIT_NORM[1]) / ranks,
        1,
        {of.length: attention / ranks},
    )


def stem_work(model: M2EncoderConfig, pictures: int, element: int) -> Work:
    """Pictures to tokens; all patches, for those that are dropped are dropped behind it."""
    width, side = model.hidden_size, model.image_size
    pixels = 3 * side * side * pictures
    pointwise = pixels * (1 + 7 * element)  # to floats, divided, shifted, scaled
    if model.stem == "patch":
        products = 2.0 * model.num_patches * pictures * 3 * model.patch_size**2 * width
        return Work(products, pointwise + 2 * pixels * element, 2 * pixels * element, 1)
    products, moved, channels = 0.0, 0.0, 3
    for channels_in, out, grid in conv_stages(model):
        products += 2 * 9 * channels_in * out * grid * grid * pictures
        moved += out * grid * grid * pictures * element
        channels = out
    products += 2 * model.num_patches * pictures * channels * width
    return Work(products, pointwise + 6 * moved, 12 * moved, 1)


def conv_stages(model: M2EncoderConfig) -> list[tuple[int, int, int]]:
    """(channels in, channels out, side of the output) of a conv stem's stages (m2_ds.model.stem.ConvStem)."""
    stages, channels, side = [], 3, model.image_size
    if model.stem_full_width:
        stages.append((channels, model.stem_full_width, side))
        channels = model.stem_full_width
    for i in range(int(math.log2(model.patch_size))):
        width = min(model.stem_width << i, model.hidden_size)
        side //= 2
        for _ in range(model.stem_depth):
            stages.append((channels, width, side))
            channels = width
    return stages


def part_work(
    model: M2EncoderConfig, part: Part, of: list[Tokens], element: int, ranks: int = 1, sequence: bool = False
) -> Work:
    """The forward of a part of the model (all of it, or a pipeline's stage), both modalities."""
    width = model.hidden_size
    classes = part.is_last and model.num_vl_layers > 0 and not sequence
    found = Work()
    for tokens in of:
        full = layer_work(model, tokens, element, ranks, sequence)
        for _ in range(part.end - part.start - classes):
            found += full
        if classes:
            found += layer_work(model, tokens, element, ranks, sequence, first_only=True)
        if part.is_last:
            found += Work(2 * 2 * tokens.samples * width * model.embed_dim)
    pictures, captions = of
    if part.is_first:
        found += stem_work(model, pictures.samples, element)
        rows = captions.padded * width * element
        # Rows are read and written; backward zeroes the whole table's gradient and adds rows to it.
        table = model.vocab_size / ranks * width * element
        found += Work(0, 6 * rows, 6 * rows + 2 * table, 1)
    return found


def loss_work(
    model: M2EncoderConfig, own: int, columns: int, captions: int, levels: int, alone: bool
) -> tuple[float, float]:
    """(operations, bytes), fp32, of logits and their gradients: rows ``own`` against ``columns``, both directions.

    In one process a tile serves both: four products. Otherwise each direction has three of its own
    (m2_ds.loss.tiles).
    """
    places = float(own) * columns * captions * levels
    products = 8 if alone else 12
    return products * places * model.embed_dim, places * 4 * (16 if alone else 32)
