"""One optimizer step: k micro-batches, one contrastive loss over all pairs of the contrast group, one update.

    forward every micro-batch                 pass 1: features; the last micro-batches keep their graphs
    gather features, loss, its gradients      once, over k b pairs of every rank of the group
    backward every micro-batch                pass 2: from the features' gradients; graphs that were let go are
                                              computed again

The gradients are those of one giant batch (docs/grouped_aggregation.md). With k = 1 the only graph is kept, and this is
a plain forward and backward. Legend: k micro-batches, b pairs of one, n = k b own pairs, C captions a picture, N loss
levels, G languages.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m2_ds.config import RunConfig
from m2_ds.data.stream import PairBatch
from m2_ds.engine.clock import Clock
from m2_ds.loss.answers import PADDING
from m2_ds.loss.contrastive import ContrastiveLoss, Level, contrastive_loss
from m2_ds.loss.exchange import Exchange
from m2_ds.model.random import Noise
from m2_ds.parallel.mesh import Mesh

LEVELS = ("unimodal", "vl")
PHASES = ("forward", "exchange", "loss", "recompute", "backward", "update")


@dataclass(frozen=True)
class StepResult:
    """Sums over this rank's pairs, on the device: nothing here waits for it.

    ``loss``: [N, G] by level and language, ``count``: [G] captions; ``scales``: [N] exp(logit_scale); ``grad_norm``: of
    the whole batch's gradient before clipping. On the host: ``contrastive_batch``: pairs that were compared with each
    other; ``repeated``: own pairs' group members among them (`LossConfig.repeats`).
    """

    loss: Tensor
    count: Tensor
    scales: Tensor
    grad_norm: Tensor | float | None
    contrastive_batch: int
    repeated: int


@dataclass(frozen=True)
class _Forward:
    """``features``: by level, pictures and then each set of captions, [b, E]; the logits' ``scales``, ``biases``."""

    features: list[Tensor]
    scales: list[Tensor]
    biases: list[Tensor]


class ContrastiveStep:
    """The two-pass step under a DeepSpeed engine. ``clock`` counts its phases."""

    def __init__(self, engine: Any, config: RunConfig, mesh: Mesh, languages: int) -> None:
        self.engine, self.config, self.mesh, self.languages = engine, config, mesh, languages
        model = config.model
        self.clock = Clock(mesh.device)
        self.noisy = model.drop_path > 0 or model.patch_drop > 0
        weights = (config.loss.unimodal_weight, config.loss.vl_weight)
        self.levels = [(level, weight) for level, weight in enumerate(weights) if weight > 0]
        self.micro_batch, self.accumulation = config.batch_shape(mesh.data_parallel.size)
        self.coalesce = engine.gradient_accumulation_steps() < self.accumulation
        # Without ZeRO or bf16 the engine keeps no gradient norm.
        self.plain = engine.zero_optimization_stage() == 0 and config.engine.precision == "fp32"

    @property
    def level_names(self) -> list[str]:
        return [LEVELS[level] for level, _ in self.levels]

    def __call__(self, batches: Sequence[PairBatch]) -> StepResult:
        """Every rank brings as many micro-batches; one with fewer than b pairs, or none, is filled up with padding."""
        assert len(batches) == self.accumulation
        batches = [_filled(batch, self.micro_batch) for batch in batches]
        ids = torch.cat([batch.group for batch in batches])
        exchange = Exchange(ids, self.mesh.contrast, len(batches), self.config.loss.exchange)
        kept_from = max(0, len(batches) - self.config.engine.kept_graphs)
        graphs: list[_Forward | None] = []
        for number, batch in enumerate(batches):
            with self.clock("forward"), torch.set_grad_enabled(number >= kept_from):
                out = self._forward(batch)
                exchange.send(out.features)
            graphs.append(out if number >= kept_from else None)
        with self.clock("exchange"):
            pool = exchange.receive()
        with self.clock("loss"):
            biases: list[Tensor | None] = [*out.biases] or [None] * len(self.levels)
            levels = [Level(s, weight, b) for s, (_, weight), b in zip(out.scales, self.levels, biases)]
            loss = contrastive_loss(levels, pool, self.config.loss)
        scales = torch.stack([level.logit_scale.detach().float().exp().reshape(()) for level in levels])
        del out, pool, exchange, levels
        norm = self._second_pass(batches, graphs, loss)
        language = torch.cat([batch.language for batch in batches], dim=1)
        return StepResult(*self._by_language(loss.by_pair, language, ids), scales, norm, loss.pairs, loss.repeated)

    def _forward(self, batch: PairBatch) -> _Forward:
        captions = batch.ids.shape[0]
        image, text, logits = self.engine(
            batch.images, batch.ids.flatten(0, 1), batch.mask.flatten(0, 1), *self._noise(batch, captions)
        )
        features = []
        for level, _ in self.levels:
            features += [image[level], *text[level].unflatten(0, (captions, -1))]
        return _Forward(
            features,
            [logits.scale[level] for level, _ in self.levels],
            [logits.bias[level] for level, _ in self.levels if logits.bias is not None],
        )

    def _second_pass(
        self, batches: Sequence[PairBatch], graphs: list[_Forward | None], loss: ContrastiveLoss
    ) -> Tensor | float | None:
        """Backward of all micro-batches and the update; the norm of the gradient before clipping."""
        kept = [number for number, graph in enumerate(graphs) if graph is not None]
        order = [*reversed(kept), *(number for number, graph in enumerate(graphs) if graph is None)]
        once = self.engine.coalesce_grad_reduction() if self.coalesce else contextlib.nullcontext()
        with once:
            for place, number in enumerate(order):
                out, graphs[number] = graphs[number], None
                if out is None:
                    with self.clock("recompute"):
                        out = self._forward(batches[number])
                with self.clock("backward"):
                    self._backward(out, loss, number)
                del out
                if place < len(order) - 1 and not self.coalesce:
                    self.engine.step()
        with self.clock("update"):
            norm = self._plain_norm() if self.plain else None
            self.engine.step()
        return self.engine.get_global_grad_norm() if norm is None else norm

    def _backward(self, out: _Forward, loss: ContrastiveLoss, number: int) -> None:
        """From the gradients of micro-batch ``number``'s features through the model.

        The engine averages over all data-parallel ranks: own shares times the group's size have the mean over groups of
        the groups' gradients as that average. It would also divide by the micro-batches, whose sum is the gradient
        already. Both factors stand here and nowhere else.
        """
        rows = slice(number * self.micro_batch, (number + 1) * self.micro_batch)
        gradients = [g[rows] for level in loss.gradients for g in level.features]
        surrogate = torch.stack([torch.sum(f * g) for f, g in zip(out.features, gradients)]).sum()
        once_a_step = zip(out.scales + out.biases, [g.logit_scale for g in loss.gradients] + _biases(loss))
        for parameter, gradient in once_a_step:
            surrogate = surrogate + (parameter.to(gradient.dtype) * gradient).sum() / self.accumulation
        self.engine.backward(surrogate * self.mesh.contrast.size, scale_wrt_gas=False)

    def _noise(self, batch: PairBatch, captions: int) -> tuple[Noise | None, Noise | None]:
        """A function of each pair's place in the stream, so that the second forward repeats the first."""
        if not self.noisy:
            return None, None
        seed = self.config.seed
        keys = [Noise.of(seed, batch.slot, view=1 + c).keys for c in range(captions)]
        return Noise.of(seed, batch.slot), Noise(torch.cat(keys))

    def _by_language(self, by_pair: Tensor, language: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        where = language.flatten()
        real = (ids != PADDING).to(by_pair.dtype).expand(len(language), -1).flatten()
        loss = by_pair.new_zeros(len(by_pair), self.languages).index_add_(1, where, by_pair.flatten(1))
        return loss, by_pair.new_zeros(self.languages).index_add_(0, where, real)

    def _plain_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])


def _biases(loss: ContrastiveLoss) -> list[Tensor]:
    return [level.logit_bias for level in loss.gradients if level.logit_bias is not None]


def _filled(batch: PairBatch, pairs: int) -> PairBatch:
    """The batch with rows of padding up to ``pairs``, so that every rank brings as many to the gather."""
    missing = pairs - len(batch.slot)
    if missing < 0:
        raise ValueError(f"a micro-batch of {len(batch.slot)} pairs; this run's have {pairs}")
    return batch if missing == 0 else batch.padded(missing, PADDING)
