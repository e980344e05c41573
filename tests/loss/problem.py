"""A contrastive problem with all parts: two levels, captions, repeats, and leaves to take gradients of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from m2_ds.loss.config import LossConfig
from m2_ds.loss.contrastive import ContrastiveLoss, Level
from tests.loss.dense import dense_loss

WEIGHTS = (0.7, 1.3)
WIDTH = 8


@dataclass(frozen=True)
class Problem:
    """``raw``: N (1 + C) matrices [B, E], not normalised; ``ids`` [B]."""

    raw: list[Tensor]
    scales: list[Tensor]
    biases: list[Tensor]
    ids: Tensor

    @staticmethod
    def random(seed: int, pairs: int, captions: int, dtype: torch.dtype = torch.float64) -> "Problem":
        g = torch.Generator().manual_seed(seed)
        raw = [torch.randn(pairs, WIDTH, dtype=torch.float64, generator=g) for _ in range(2 * (1 + captions))]
        return Problem(
            [x.to(dtype).requires_grad_() for x in raw],
            [torch.tensor([s], dtype=dtype, requires_grad=True) for s in (1.5, 3.0)],
            [torch.tensor([s], dtype=dtype, requires_grad=True) for s in (-1.0, -2.0)],
            torch.randint(0, pairs, (pairs,), generator=g),
        )

    @property
    def captions(self) -> int:
        return len(self.raw) // 2 - 1

    def features(self) -> list[Tensor]:
        return [F.normalize(x, dim=-1) for x in self.raw]

    def levels(self, form: str = "softmax") -> list[Level]:
        biases = self.biases if form == "sigmoid" else (None, None)
        return [Level(s, w, b) for s, w, b in zip(self.scales, WEIGHTS, biases)]

    def dense(self, config: LossConfig, features: Sequence[Tensor] | None = None) -> Tensor:
        features = self.features() if features is None else features
        first, loss = 1 + self.captions, torch.zeros((), dtype=features[0].dtype)
        for n, (scale, bias, weight) in enumerate(zip(self.scales, self.biases, WEIGHTS)):
            image, *texts = features[n * first : (n + 1) * first]
            parts = [dense_loss(image, text, scale, self.ids, config, bias) for text in texts]
            loss = loss + weight * torch.stack(parts).mean()
        return loss

    def dense_gradients(self, config: LossConfig) -> list[Tensor]:
        """Towards features, then scales, then (sigmoid) biases."""
        features = [x.detach().requires_grad_() for x in self.features()]
        leaves = features + self.scales + (self.biases if config.form == "sigmoid" else [])
        return list(torch.autograd.grad(self.dense(config, features), leaves))


def gradients_of(loss: ContrastiveLoss) -> list[Tensor]:
    """In the order of `Problem.dense_gradients`."""
    found = [x for level in loss.gradients for x in level.features]
    found += [level.logit_scale for level in loss.gradients]
    return found + [level.logit_bias for level in loss.gradients if level.logit_bias is not None]


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest number; inf where anything is not finite."""
    assert found.shape == wanted.shape and wanted.abs().max() > 0
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return error if error < torch.inf else torch.inf
