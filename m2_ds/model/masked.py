"""Masked objectives over pictures and captions in one sequence: hidden words and hidden patches are told (CMLM, CMIM).

SyCoCa (arXiv 2401.02137), with targets of BERT (arXiv 1810.04805), MAE (arXiv 2111.06377) or BEiT v2 (arXiv
2208.06366). Captions of one micro-batch run once for each objective, in one joint batch.
Legend: b pictures, C captions a picture, n = C b captions, J joint sequences (n for each objective, CMLM's first),
L text tokens, P patches, D width, R hidden places, V vocabulary, p patch side, S image side.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2_ds.model.layers import Layers
from m2_ds.model.masking import hide_attended, word_numbers
from m2_ds.model.random import Noise
from m2_ds.words import Words

if TYPE_CHECKING:
    from m2_ds.model.encoder import M2Encoder

_JOINT_VIEW = 1 << 22  # tells the random decisions of joint sequences from those of captions alone


class VisualTokenizer(Protocol):
    """A frozen model whose codes stand for patches: what `loss.cmim.visual_tokenizer` has to give."""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, S, S] -> int64 [b, P], row by row, each below `loss.cmim.codes`."""


@dataclass(frozen=True)
class MaskedInputs:
    """What is hidden in a micro-batch. Parts that no objective asks for are None.

    ``words`` bool [n, L]: hidden tokens, in whose place ``mask_id`` stands; ``patches`` bool [n, P], each with
    ``patch_count`` of them, which without it are those nearest to the caption (0: CMIM is not asked for); ``codes``
    int64 [b, P]: targets in place of pixels; ``real`` bool [n]: captions of pairs, not of padding.
    """

    words: Tensor | None
    mask_id: int
    patches: Tensor | None
    patch_count: int
    codes: Tensor | None
    real: Tensor

    @property
    def objectives(self) -> int:
        return (self.words is not None) + (self.patch_count > 0)

    def ids(self, ids: Tensor) -> Tensor:
        """[J, L] of captions [n, L]."""
        hidden = [] if self.words is None else [ids.masked_fill(self.words[:, : ids.shape[1]], self.mask_id)]
        return torch.cat([*hidden, *([ids] if self.patch_count else [])])

    def hidden_patches(self) -> Tensor | None:
        """bool [J, P]: none in the sequences whose words are hidden."""
        if self.patches is None:
            return None
        return self.patches if self.words is None else torch.cat([torch.zeros_like(self.patches), self.patches])

    @property
    def chooses(self) -> bool:
        """Whether patches are still to be chosen, by embeddings."""
        return self.patch_count > 0 and self.patches is None

    def choose(self, image: Tensor, text: Tensor) -> "MaskedInputs":
        """With the patches named, from unit vectors of patches [b, P, E] and of captions [n, E]."""
        with torch.no_grad():
            captions = text.unflatten(0, (-1, len(image)))
            scores = torch.einsum("bpe,cbe->cbp", image.float(), captions.float()).flatten(0, 1)
        return replace(self, patches=hide_attended(scores, self.patch_count))


def joint_noise(captions: Noise | None, objectives: int) -> Noise | None:
    """Of the J joint sequences, from that of their captions."""
    if captions is None:
        return None
    return Noise(torch.cat([captions.keys ^ (_JOINT_VIEW << i) for i in range(objectives)]))


def joint_valid(valid: Tensor, patches: int, objectives: int) -> Tensor:
    """bool [J, patches + L] from captions' [n, L]; ``patches``: tokens of a picture."""
    return F.pad(valid, (patches, 0), value=True).repeat(objectives, 1)


class MaskedSums(NamedTuple):
    """``text``: sum of cross entropies [1] over hidden tokens, ``image``: of errors over hidden patches (in the graph).

    Without it, by caption: ``told`` [3, n]: cross entropy, right answers, hidden tokens; ``rebuilt`` [2, n]: error and
    hidden patches.
    """

    text: Tensor | None
    image: Tensor | None
    told: Tensor | None
    rebuilt: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.text, self.image) if x is not None]

    def detach(self) -> "MaskedSums":
        return MaskedSums(*(None if x is None else x.detach() for x in self))


class Transform(nn.Module):
    """What both heads begin with: a dense layer, GELU, LayerNorm (BERT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))


class TextHead(nn.Module):
    """Hidden tokens from their states."""

    def __init__(self, width: int, rows: int, layers: Layers) -> None:
        super().__init__()
        self.transform = Transform(width)
        self.vocabulary: Any = layers.vocabulary(width, rows)

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """States [R, D], ids [R] -> cross entropy [R] in fp32, and whether the likeliest token is right [R]."""
        losses, right = self.vocabulary(self.transform(x), targets)
        return losses, right


class ImageHead(nn.Module):
    """Pixels or codes of hidden patches from their states."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.transform = Transform(width)
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[R, D] -> [R, 3 p p] or [R, codes], fp32."""
        return self.out(self.transform(x)).float()


def pixels_of(images: Tensor, patch_size: int) -> Tensor:
    """uint8 (or float in [0, 1]) [b, 3, S, S] -> fp32 [b, P, 3 p p] in [0, 1], channels first."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    g = images.shape[-1] // patch_size
    x = x.unflatten(3, (g, patch_size)).unflatten(2, (g, patch_size))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def pixel_targets(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches [..., 3 p p] with mean 0 and variance 1 each, and what undoes it: mean and deviation [..., 1]."""
    mean = pixels.mean(-1, keepdim=True)
    deviation = (pixels.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    return (pixels - mean) / deviation, mean, deviation


def text_sums(head: TextHead, states: Tensor, ids: Tensor, masked: MaskedInputs) -> tuple[Tensor, Tensor]:
    """From states [n, L, D] and true ``ids`` [n, L]: the sum [1], and `MaskedSums.told`."""
    assert masked.words is not None
    hidden = masked.words[:, : ids.shape[1]]
    caption, place = hidden.nonzero(as_tuple=True)  # a GPU waits here for how many there are
    losses, right = head(states[caption, place], ids[caption, place])
    detached = torch.stack([losses.detach(), right.to(losses.dtype), torch.ones_like(losses)])
    told = detached.new_zeros(3, len(ids)).index_add_(1, caption, detached)
    return losses.sum().reshape(1), told


def image_sums(
    head: ImageHead, states: Tensor, images: Tensor, masked: MaskedInputs, patch_size: int
) -> tuple[Tensor, Tensor]:
    """From states [n, P, D] and pictures [b, 3, S, S]: the sum [1], and `MaskedSums.rebuilt`."""
    assert masked.patches is not None
    order = masked.patches.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    rows = order[:, : masked.patch_count]
    picture = torch.arange(len(states), device=states.device) % len(images)
    found = head(states.gather(1, rows[..., None].expand(-1, -1, states.shape[2])))
    if masked.codes is None:
        targets, *_ = pixel_targets(pixels_of(images, patch_size))
        wanted = targets[picture[:, None], rows]
        errors = (found - wanted).square().mean(-1)
    else:
        wanted = masked.codes[picture[:, None], rows]
        errors = F.cross_entropy(found.flatten(0, 1), wanted.flatten(), reduction="none").view_as(rows)
    errors = errors * masked.real[:, None]
    counts = masked.real.to(errors.dtype) * rows.shape[1]
    return errors.sum().reshape(1), torch.stack([errors.detach().sum(1), counts])


def caption_scores(
    model: "M2Encoder", images: Tensor, ids: Tensor, mask: Tensor, words: Words, rounds: int = 4
) -> Tensor:
    """How well captions fit their pictures, by the words that the picture lets the model tell: fp32 [n].

    The mean log-probability of a caption's tokens, each hidden with its whole word in one of ``rounds`` forwards, the
    rest of the caption being there (a pseudo-likelihood, arXiv 1910.14659, given the picture). ``images`` [n, 3, S, S],
    ``ids`` and ``mask`` [n, L]. Raises ValueError for a model without the head, which loss.cmlm trains.
    """
    told, _ = _tell(model, images, ids, mask, words, rounds)
    return -told[0] / told[2].clamp(min=1)


def told_words(
    model: "M2Encoder", images: Tensor, ids: Tensor, mask: Tensor, words: Words, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """How many words of each caption the model tells wholly right, hidden one at a time, and how many it has: [n].

    ``most``: forwards to make, as many as any caption has words; None: as these have.
    """
    count = word_numbers(ids, mask, words).amax(1)
    _, wrong = _tell(model, images, ids, mask, words, int(count.max()) if most is None else most)
    return count - wrong, count


def _tell(
    model: "M2Encoder", images: Tensor, ids: Tensor, mask: Tensor, words: Words, rounds: int
) -> tuple[Tensor, Tensor]:
    """`MaskedSums.told` [3, n] of all rounds, word w hidden in round w modulo ``rounds``; rounds with an error [n].

    There are ``rounds`` forwards whatever the captions: ranks that share partitioned weights run equally often.
    """
    if not model.config.masked_text_head:
        raise ValueError("this model has no head that tells hidden words; train one with loss.cmlm.weight above 0")
    number = word_numbers(ids, mask, words)
    tokens, real = model.backbone.vision_embed(images), torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    sums, wrong = torch.zeros(3, len(ids), device=ids.device), torch.zeros(len(ids), device=ids.device)
    for turn in range(rounds):
        hidden = MaskedInputs((number > 0) & ((number - 1) % rounds == turn), words.mask_id, None, 0, None, real)
        states = _joint_states(model, tokens, hidden.ids(ids), mask)[:, tokens.shape[1] :]
        told = text_sums(model.masked_text_head, states, ids, hidden)[1].float()
        sums, wrong = sums + told, wrong + (told[1] < told[2])
    return sums, wrong


def guess_words(model: "M2Encoder", images: Tensor, ids: Tensor, mask: Tensor, hidden: Tensor, mask_id: int) -> Tensor:
    """Captions [n, L] with the likeliest tokens in place of those ``hidden`` (bool [n, L]), all told at once."""
    inputs = MaskedInputs(hidden, mask_id, None, 0, None, hidden.any(1))
    tokens = model.backbone.vision_embed(images)
    states = _joint_states(model, tokens, inputs.ids(ids), mask)[:, tokens.shape[1] :][hidden]
    head = model.masked_text_head
    return ids.masked_scatter(hidden, head.vocabulary(head.transform(states)).argmax(1))


def rebuild_patches(model: "M2Encoder", images: Tensor, ids: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
    """Pictures fp32 [n, 3, S, S] in [0, 1], hidden patches (bool [n, P]) rebuilt from the rest and the caption.

    Targets are normalised by patch, so brightness and contrast of a rebuilt one are the true ones (as MAE shows them).
    Raises ValueError for a model whose head does not tell pixels.
    """
    config = model.config
    if config.masked_image_head != config.patch_values:
        raise ValueError("this model has no head that tells pixels; train one with loss.cmim (targets: pixels)")
    tokens = model.backbone.vision_embed(images)
    states = _joint_states(model, tokens, ids, mask, hidden)[:, 1 : tokens.shape[1]]
    pixels = pixels_of(images, config.patch_size)
    _, mean, deviation = pixel_targets(pixels)
    told = model.masked_image_head(states) * deviation + mean
    squares = torch.where(hidden[..., None], told, pixels).clamp(0, 1)
    return F.fold(squares.transpose(1, 2), config.image_size, config.patch_size, stride=config.patch_size)


def _joint_states(
    model: "M2Encoder", tokens: Tensor, ids: Tensor, mask: Tensor, patches: Tensor | None = None
) -> Tensor:
    """[n, P + 1 + L, D] from pictures' tokens [n, P + 1, D] and captions."""
    split, valid = tokens.shape[1], joint_valid(mask.bool(), tokens.shape[1], 1)
    x = model.enter_jointly(tokens, ids, patches)
    return model.backbone_vl(model.backbone.encoder(x, split, valid), split, valid)
