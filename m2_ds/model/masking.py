"""Which words and patches the masked objectives hide: functions of each sample's random numbers, not of its batch.

Legend: n captions, L tokens, P patches.
"""

import torch
from torch import Tensor

from m2_ds.model.random import Noise
from m2_ds.words import Words

_WORDS, _WORD_COUNT, _PATCHES = ((1 << 21) + i for i in range(3))  # decisions, outside the range of layers


def hide_words(ids: Tensor, valid: Tensor, words: Words, share: float, noise: Noise) -> Tensor:
    """Places bool [n, L] of the tokens to hide in captions ``ids`` [n, L]: whole words, drawn evenly.

    Of W words, ``share`` W are hidden on average (rounded up or down at random), and one at least. What is no part of a
    word (start, end, padding) is never hidden.
    """
    number = word_numbers(ids, valid, words)
    count = number.amax(1, keepdim=True)
    wanted = (count * share + noise.uniform(_WORD_COUNT)).floor().clamp(min=1)
    lanes = torch.arange(ids.shape[1], device=ids.device)
    drawn = noise.uniform(_WORDS, ids.shape[1]).masked_fill(lanes >= count, 2.0)
    chosen = _ranks(drawn) < wanted
    return (number > 0) & chosen.gather(1, (number - 1).clamp(min=0))


def word_numbers(ids: Tensor, valid: Tensor, words: Words) -> Tensor:
    """int64 [n, L]: of which word of its caption each token is a part, from 1; 0: of none."""
    inside = valid.bool() & ~words.special[ids]
    after = torch.ones_like(inside)
    after[:, 1:] = words.ends[ids[:, :-1]] | ~inside[:, :-1]
    starts = inside & (words.begins[ids] | after)
    return starts.cumsum(1) * inside


def hide_patches(noise: Noise, patches: int, share: float) -> Tensor:
    """Places bool [n, P] of `hidden_count` patches, drawn evenly."""
    return _ranks(noise.uniform(_PATCHES, patches)) < hidden_count(patches, share)


def hide_attended(scores: Tensor, count: int) -> Tensor:
    """Places bool [n, P] of the ``count`` patches that have the largest ``scores`` [n, P]."""
    return _ranks(-scores) < count


def hidden_count(patches: int, share: float) -> int:
    return max(1, round(patches * share))


def _ranks(x: Tensor) -> Tensor:
    """The place of each number in its sorted row, from 0."""
    return x.argsort(dim=1, stable=True).argsort(dim=1)
