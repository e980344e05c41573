"""One optimizer step: a batch through the model, its loss over the group, an update through the engine.

Legend: B own pairs, C captions a picture, N loss levels, G languages, E embedding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m2_ds.config import RunConfig
from m2_ds.data.stream import PairBatch
from m2_ds.loss.contrastive import Level, contrastive_loss
from m2_ds.model.encoder import Features
from m2_ds.model.random import Noise
from m2_ds.parallel.mesh import Mesh

LEVELS = ("unimodal", "vl")


@dataclass(frozen=True)
class StepResult:
    """Sums over this rank's pairs, on the device: nothing here waits for it.

    ``loss``: [N, G] by level and language, ``count``: [G] captions; ``scales``: [N] exp(logit_scale); ``grad_norm``: of
    the whole batch's gradient before clipping (None where DeepSpeed was told not to compute it).
    """

    loss: Tensor
    count: Tensor
    scales: Tensor
    grad_norm: Tensor | float | None


class ContrastiveStep:
    """Forward, ITC at both levels over the data-parallel group, backward and update."""

    def __init__(self, engine: Any, config: RunConfig, mesh: Mesh, languages: int) -> None:
        self.engine, self.config, self.mesh, self.languages = engine, config, mesh, languages
        model = config.model
        self.noisy = model.drop_path > 0 or model.patch_drop > 0
        self.weights = (config.loss.unimodal_weight, config.loss.vl_weight)
        # Without ZeRO or bf16 the engine keeps no gradient norm.
        self.plain = engine.zero_optimization_stage() == 0 and config.engine.precision == "fp32"

    def __call__(self, batch: PairBatch) -> StepResult:
        captions = batch.ids.shape[0]
        image, text, scale, vl_scale = self.engine(
            batch.images, batch.ids.flatten(0, 1), batch.mask.flatten(0, 1), *self._noise(batch, captions)
        )
        levels = self._levels(image, text, (scale, vl_scale), captions)
        loss = contrastive_loss(levels, batch.group, self.mesh.data_parallel, self.config.loss.repeats)
        self.engine.backward(loss.total)
        norm = self._plain_norm() if self.plain else None
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        scales = torch.stack([level.logit_scale.detach().float().exp().reshape(()) for level in levels])
        return StepResult(*self._by_language(loss.by_pair, batch.language), scales, norm)

    @property
    def level_names(self) -> list[str]:
        return [name for name, weight in zip(LEVELS, self.weights) if weight > 0]

    def _noise(self, batch: PairBatch, captions: int) -> tuple[Noise | None, Noise | None]:
        if not self.noisy:
            return None, None
        seed = self.config.seed
        keys = [Noise.of(seed, batch.slot, view=1 + c).keys for c in range(captions)]
        return Noise.of(seed, batch.slot), Noise(torch.cat(keys))

    def _levels(self, image: Features, text: Features, scales: tuple[Tensor, Tensor], captions: int) -> list[Level]:
        return [
            Level(i, t.unflatten(0, (captions, -1)), s, weight)
            for i, t, s, weight in zip(image, text, scales, self.weights)
            if weight > 0
        ]

    def _by_language(self, by_pair: Tensor, language: Tensor) -> tuple[Tensor, Tensor]:
        where = language.flatten()
        loss = by_pair.new_zeros(len(by_pair), self.languages).index_add_(1, where, by_pair.flatten(1))
        return loss, by_pair.new_zeros(self.languages).index_add_(0, where, torch.ones_like(where, dtype=by_pair.dtype))

    def _plain_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])
