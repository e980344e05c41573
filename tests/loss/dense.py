"""The contrastive loss written from its definition, on the full matrix: what the tiled one is compared with."""

import torch
from torch import Tensor
from torch.nn import functional as F

from m2_ds.loss.config import LossConfig


def dense_loss(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, config: LossConfig, bias: Tensor | None = None
) -> Tensor:
    """Of one set of captions at one level: features [B, E], ``ids`` int64 [B], negative for padding."""
    real = ids >= 0
    image, text, ids = image[real], text[real], ids[real]
    logits = scale.exp() * image @ text.T
    same, eye = ids[:, None] == ids, torch.eye(len(ids), dtype=torch.bool)
    right = (same if config.repeats == "positive" else eye).to(logits.dtype)
    counts = ~(same & ~eye) if config.repeats == "exclude" else torch.ones_like(same)
    if config.form == "sigmoid":
        places = F.binary_cross_entropy_with_logits(logits + bias, right, reduction="none")
        return (places * counts).sum() / len(ids)
    smooth = config.label_smoothing
    target = (1 - smooth) * right / right.sum(1, keepdim=True) + smooth * counts.to(right) / counts.sum(1, keepdim=True)
    both = [
        -(target * side.masked_fill(~counts, -torch.inf).log_softmax(1).masked_fill(~counts, 0)).sum(1).mean()
        for side in (logits, logits.T)
    ]
    return (both[0] + both[1]) / 2
