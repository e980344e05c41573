"""How the pieces of a vocabulary make words. Legend: V pieces."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Words:
    """By id, bool [V]: whether a piece ``begins`` a word, whether the next one begins another (``ends``), whether it is
    ``special`` and part of no word. ``mask_id`` stands for a hidden piece.

    A word of a spaced script is all of its pieces; Chinese, which has no spaces, is hidden piece by piece (a character
    or a word, as the vocabulary has it), and the bytes of a character that it lacks go together.
    """

    begins: Tensor
    ends: Tensor
    special: Tensor
    mask_id: int

    def to(self, device: torch.device | str) -> "Words":
        return Words(self.begins.to(device), self.ends.to(device), self.special.to(device), self.mask_id)
