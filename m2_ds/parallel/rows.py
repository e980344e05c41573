"""A loss over a large vocabulary, row by row, without the scores of all rows at once. Legend: R rows, D width."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORES = 2**24  # that exist at a time: 64 MB in fp32


def in_parts(
    told: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, targets: Tensor, columns: int
) -> tuple[Tensor, Tensor]:
    """``told`` (of rows [r, D] and targets [r], two results [r]) for all rows x [R, D], a part at a time.

    ``columns``: scores that it makes of a row. What backward needs of them is computed again.
    """
    rows = max(1, SCORES // columns)
    parts = [
        checkpoint(told, some, wanted, use_reentrant=False, preserve_rng_state=False)
        for some, wanted in zip(x.split(rows), targets.split(rows))
    ]
    first, second = zip(*parts)
    return torch.cat(first), torch.cat(second)
