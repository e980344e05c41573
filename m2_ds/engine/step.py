"""One optimizer step: k micro-batches, one contrastive loss over all pairs of the contrast group, one update.

    forward every micro-batch                 pass 1: features
    gather features, loss, its gradients      once, over k b pairs of every rank of the group
    backward every micro-batch                pass 2: from the features' gradients

The gradients are those of one giant batch (docs/grouped_aggregation.md), in every layout: how a pass is carried out is
the business of `Passes`.
Legend: k micro-batches, b pairs of one, n = k b own pairs, C captions a picture, N loss levels, G languages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m2_ds.config import RunConfig
from m2_ds.data.stream import PairBatch
from m2_ds.engine.anomalies import by_pair
from m2_ds.engine.clock import Clock
from m2_ds.engine.masked import MaskedResult, Masking
from m2_ds.engine.passes import EnginePasses, Forward, Inputs, Passes
from m2_ds.loss.answers import PADDING
from m2_ds.loss.contrastive import ContrastiveLoss, Level, contrastive_loss
from m2_ds.loss.exchange import Exchange
from m2_ds.loss.shares import Shares
from m2_ds.model.random import Noise
from m2_ds.parallel.collectives import broadcast
from m2_ds.parallel.mesh import Mesh
from m2_ds.words import Words

LEVELS = ("unimodal", "vl")


@dataclass(frozen=True)
class StepResult:
    """Sums over this rank's pairs, on the device: nothing here waits for it.

    ``loss``: [N, G] by level and language, ``count``: [G] captions; ``scales``: [N] exp(logit_scale); ``grad_norm``: of
    the whole batch's gradient before clipping. ``contrastive_batch``: pairs that were compared with each other;
    ``repeated``: own pairs' group members among them (`LossConfig.repeats`). ``by_pair``: [n] the contrastive loss of
    each own pair, on the last stage of a pipeline.
    """

    loss: Tensor
    count: Tensor
    scales: Tensor
    grad_norm: Tensor | float | None
    contrastive_batch: int | Tensor
    repeated: int | Tensor
    masked: MaskedResult | None = None
    by_pair: Tensor | None = None


class ContrastiveStep:
    """The two-pass step under a DeepSpeed engine, pipelined or not. ``clock`` counts its phases."""

    def __init__(self, engine: Any, config: RunConfig, mesh: Mesh, languages: int, words: Words | None = None) -> None:
        """``words``: the tokenizer's, where the loss has masked objectives."""
        self.config, self.mesh, self.languages = config, mesh, languages
        model = config.model
        self.clock = Clock(mesh.device, mesh.traffic.activity)
        self.noisy = model.drop_path > 0 or model.patch_drop > 0
        weights = (config.loss.unimodal_weight, config.loss.vl_weight)
        self.levels = [(level, weight) for level, weight in enumerate(weights) if weight > 0]
        self.micro_batch, self.accumulation = config.batch_shape(mesh.data_parallel.size)
        numbers = [level for level, _ in self.levels]
        self.passes: Passes
        if mesh.pipeline.size > 1:
            from m2_ds.engine.pipeline import PipelinePasses

            self.passes = PipelinePasses(engine, engine.module.forward_funcs[0], self.clock, numbers)
        else:
            self.passes = EnginePasses(engine, self.clock, numbers, self.accumulation, config.engine.kept_graphs)
        self.masking: Masking | None = None
        if config.loss.masked:
            assert words is not None
            self.masking = Masking(config, mesh, words, languages)

    @property
    def level_names(self) -> list[str]:
        return [LEVELS[level] for level, _ in self.levels]

    def __call__(self, batches: Sequence[PairBatch], step: int = 0) -> StepResult:
        """``step``: its number from 0, by which the masked objectives' weights go.

        Every rank brings as many micro-batches; one with fewer than b pairs, or none, is filled up with padding.
        """
        assert len(batches) == self.accumulation
        batches = [_filled(batch, self.micro_batch) for batch in batches]
        ids = torch.cat([batch.group for batch in batches])
        inputs = [self._inputs(batch) for batch in batches]
        if self.masking is not None:
            inputs = self.masking.of(inputs, batches)
        forwards = self.passes.forward(inputs)
        loss = scales = None
        if self.mesh.pipeline.is_last:
            loss, scales = self._compare(forwards, ids)
        else:  # features end on another stage; this one has its part in them all the same
            assert not list(forwards)
        of_masked = [] if self.masking is None else self.masking.gradients(step)
        norm = self.passes.backward(inputs, None if loss is None else self._gradients(loss, of_masked))
        language = torch.cat([batch.language for batch in batches], dim=1)
        masked = None if self.masking is None else self.masking.result(self.passes.sums, batches, step)
        return self._result(loss, scales, norm, language, ids, masked)

    def _compare(self, forwards: Iterator[Forward], ids: Tensor) -> tuple[ContrastiveLoss, Tensor]:
        """The loss over the group's pairs, and exp(logit_scale) [N]. Features travel while the next are computed."""
        shares = Shares(self.mesh.tensor, self.accumulation, self.micro_batch)
        exchange = Exchange(shares.own_ids(ids), self.mesh.contrast, self.accumulation, self.config.loss.exchange)
        for out in forwards:
            exchange.send([shares.own(x) for x in out.features])
        with self.clock("exchange"):
            pool = exchange.receive()
        with self.clock("loss"):
            biases: list[Tensor | None] = [*out.biases] or [None] * len(self.levels)
            levels = [Level(s, weight, b) for s, (_, weight), b in zip(out.scales, self.levels, biases)]
            loss = shares.join(contrastive_loss(levels, pool, self.config.loss))
        return loss, torch.stack([scale.detach().float().exp().reshape(()) for scale in out.scales])

    def _inputs(self, batch: PairBatch) -> Inputs:
        """Random decisions are a function of each pair's place in the stream, so that pass 2 repeats pass 1."""
        image_noise = text_noise = None
        captions = batch.ids.shape[0]
        if self.noisy:
            seed = self.config.seed
            keys = [Noise.of(seed, batch.slot, view=1 + c).keys for c in range(captions)]
            image_noise, text_noise = Noise.of(seed, batch.slot), Noise(torch.cat(keys))
        ids, mask = batch.ids.flatten(0, 1), batch.mask.flatten(0, 1)
        return Inputs(batch.images, ids, mask, image_noise, text_noise, captions)

    def _gradients(self, loss: ContrastiveLoss, of_masked: list[Tensor]) -> list[Forward]:
        """What pass 2 starts from, by micro-batch; ``of_masked``: of the masked objectives' sums.

        The engine averages over all data-parallel ranks: own shares times the group's data-parallel ranks have the mean
        over groups of the groups' gradients as that average. Scales and biases get theirs once, from the micro-batches
        together. Both factors stand here and nowhere else; that DeepSpeed divides by the micro-batches is undone by
        `Passes`.
        """
        ranks = self.mesh.contrast_ranks
        scales = [level.logit_scale * (ranks / self.accumulation) for level in loss.gradients]
        biases = [x.logit_bias * (ranks / self.accumulation) for x in loss.gradients if x.logit_bias is not None]
        features = [x * ranks for level in loss.gradients for x in level.features]
        parts = zip(*(x.split(self.micro_batch) for x in features))
        return [Forward(list(part), scales, biases, of_masked) for part in parts]

    def _result(
        self,
        loss: ContrastiveLoss | None,
        scales: Tensor | None,
        norm: Tensor | float | None,
        language: Tensor,
        ids: Tensor,
        masked: MaskedResult | None,
    ) -> StepResult:
        """On every rank of a pipeline what its last stage found."""
        real = (ids != PADDING).float().expand(len(language), -1).flatten()
        count = real.new_zeros(self.languages).index_add_(0, language.flatten(), real)
        each = None if loss is None else by_pair(loss.by_pair, [weight for _, weight in self.levels])
        if self.mesh.pipeline.size == 1:
            assert loss is not None and scales is not None
            by_language = self._by_language(loss.by_pair, language)
            return StepResult(by_language, count.to(by_language), scales, norm, loss.pairs, loss.repeated, masked, each)
        levels, size = len(self.levels), len(self.levels) * self.languages
        told = count.new_empty(size + levels + 2)
        if loss is not None and scales is not None:
            counts = told.new_tensor([float(loss.pairs), float(loss.repeated)])
            told = torch.cat([self._by_language(loss.by_pair, language).flatten(), scales, counts])
        last = self.mesh.pipeline.size - 1
        broadcast(told, self.mesh.pipeline, last, "log")
        if masked is not None:
            for sums in (masked.words, masked.patches):
                broadcast(sums, self.mesh.pipeline, last, "log")
        by_language = told[:size].view(levels, self.languages)
        return StepResult(by_language, count, told[size:-2], norm, told[-2], told[-1], masked, each)

    def _by_language(self, by_pair: Tensor, language: Tensor) -> Tensor:
        sums = by_pair.new_zeros(len(by_pair), self.languages)
        return sums.index_add_(1, language.flatten(), by_pair.flatten(1))


def _filled(batch: PairBatch, pairs: int) -> PairBatch:
    """The batch with rows of padding up to ``pairs``, so that every rank brings as many to the gather."""
    missing = pairs - len(batch.slot)
    if missing < 0:
        raise ValueError(f"a micro-batch of {len(batch.slot)} pairs; this run's have {pairs}")
    return batch if missing == 0 else batch.padded(missing, PADDING)
