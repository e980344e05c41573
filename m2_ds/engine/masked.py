"""The masked objectives (CMLM, CMIM) in a step: what is hidden, what their sums weigh, what is told of them.

Their loss is local to a micro-batch: it needs no negatives, so it rides on the second pass. It is the mean over all
hidden tokens, or patches, of the global batch, whose number is known before: the same for any layout.
Legend: k micro-batches, b pairs of one, C captions a picture, n = C b, L tokens, P patches, G languages.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from m2_ds.config import RunConfig
from m2_ds.data.batch import PairBatch
from m2_ds.engine.passes import Inputs
from m2_ds.loss.answers import PADDING
from m2_ds.model.masked import MaskedInputs, MaskedSums, VisualTokenizer
from m2_ds.model.masking import hidden_count, hide_patches, hide_words
from m2_ds.model.random import Noise
from m2_ds.parallel.collectives import Reducing, all_reduce_sum, start_all_reduce
from m2_ds.parallel.mesh import Group, Mesh
from m2_ds.words import Words

OBJECTIVES = ("cmlm", "cmim")
_VIEW = 1 << 8  # of a sample's randomness: what is hidden, apart from what layers drop


@dataclass(frozen=True)
class MaskedResult:
    """Sums over this rank's pairs: ``words`` [3, G] cross entropy, right answers and hidden tokens by language;
    ``patches`` [2] error and hidden patches. ``weights``: of the two objectives in this step's loss; ``asked``: which
    of them the run has."""

    words: Tensor
    patches: Tensor
    weights: tuple[float, float]
    asked: tuple[bool, bool]

    def flat(self) -> Tensor:
        return torch.cat([self.words.flatten(), self.patches])


class Masking:
    """The masked objectives of a run; ask `of` first. ``words``: the tokenizer's."""

    def __init__(self, config: RunConfig, mesh: Mesh, words: Words, languages: int) -> None:
        """Raises ValueError for a visual tokenizer that cannot be had."""
        self.cmlm, self.cmim, self.steps = config.loss.cmlm, config.loss.cmim, config.steps
        self.seed, self.mesh, self.languages = config.seed, mesh, languages
        self.asked = (self.cmlm.weight > 0, self.cmim.weight > 0)
        self.patches = config.model.num_patches
        self.patch_count = hidden_count(self.patches, self.cmim.share) if self.cmim.weight else 0
        device = mesh.device
        self.words = words.to(device)
        self.tokenize: VisualTokenizer | None = None
        if self.cmim.weight and self.cmim.visual_tokenizer and mesh.pipeline.is_last:
            self.tokenize = load_visual_tokenizer(self.cmim.visual_tokenizer, device)
        self._totals = torch.zeros(0)
        self._counting: Reducing | None = None

    def of(self, inputs: Sequence[Inputs], batches: Sequence[PairBatch]) -> list[Inputs]:
        """With what is hidden, a function of each pair's place in the stream; the count over all ranks is begun."""
        found = [self._hide(x, batch) for x, batch in zip(inputs, batches)]
        words = [masked.words.sum() for masked in found if masked.words is not None]
        patches = torch.stack([masked.real.sum() for masked in found]).sum() * self.patch_count
        self._totals = torch.stack([torch.stack(words).sum() if words else patches * 0, patches]).double()
        self._counting = start_all_reduce(self._totals, self.mesh.data_parallel, "masked")
        return [replace(x, masked=masked) for x, masked in zip(inputs, found)]

    def _hide(self, x: Inputs, batch: PairBatch) -> MaskedInputs:
        real = (batch.group != PADDING).expand(x.captions, -1).flatten()
        keys = [Noise.of(self.seed, batch.slot, view=_VIEW + c).keys for c in range(x.captions)]
        noise = Noise(torch.cat(keys))
        words = patches = codes = None
        if self.cmlm.weight:
            words = hide_words(x.ids, x.mask, self.words, self.cmlm.share, noise) & real[:, None]
        if self.cmim.weight and self.cmim.choose == "random":
            patches = hide_patches(noise, self.patches, self.cmim.share)
        if self.tokenize is not None:
            codes = checked_codes(self.tokenize(x.images), len(x.images), self.patches, self.cmim.codes)
        return MaskedInputs(words, self.words.mask_id, patches, self.patch_count, codes, real)

    def weights(self, step: int) -> tuple[float, float]:
        return self.cmlm.weight_at(step, self.steps), self.cmim.weight_at(step, self.steps)

    def gradients(self, step: int) -> list[Tensor]:
        """Of each objective's sum over a micro-batch: its weight over the global count, in the engine's average over
        data-parallel ranks."""
        if self._counting is not None:
            self._counting.wait()
            self._counting = None
        ranks = self.mesh.data_parallel.size
        scaled = [ranks * w / total.clamp(min=1) for w, total in zip(self.weights(step), self._totals)]
        return [x.float().reshape(1) for x, wanted in zip(scaled, self.asked) if wanted]

    def result(self, sums: Mapping[int, MaskedSums], batches: Sequence[PairBatch], step: int) -> MaskedResult:
        """By language, from the sums of each micro-batch; zeros where there are none."""
        words = torch.zeros(3, self.languages, device=self.mesh.device)
        patches = torch.zeros(2, device=self.mesh.device)
        for number, found in sums.items():
            if found.told is not None:
                words = words.index_add(1, batches[number].language.flatten(), found.told.float())
            if found.rebuilt is not None:
                patches = patches + found.rebuilt.sum(1)
        return MaskedResult(words, patches, self.weights(step), self.asked)


def summarise(
    results: Sequence[MaskedResult], languages: Sequence[str], group: Group
) -> tuple[float, dict[str, float | None]]:
    """What masked objectives add to the loss, and their numbers, over the steps of ``results`` and all ranks.

    loss/cmlm, loss/cmim by hidden token and patch (without their weights), cmlm_accuracy by language, cmim_error. A
    number of something that was never hidden is None.
    """
    if not results:
        return 0.0, {}
    flat = torch.stack([result.flat() for result in results]).sum(0)
    flat = all_reduce_sum(flat, group, "log").cpu().double()
    entropy, right, tokens = flat[:-2].view(3, len(languages))
    error, patches = flat[-2:].tolist()
    weights = [sum(pair) / len(results) for pair in zip(*(result.weights for result in results))]
    numbers: dict[str, float | None] = {}
    if results[-1].asked[0]:
        numbers["loss/cmlm"] = _mean(entropy.sum(), tokens.sum())
        for language, x, count in zip(languages, right, tokens):
            numbers[f"cmlm_accuracy/{language}"] = _mean(x, count)
    if results[-1].asked[1]:
        numbers["loss/cmim"] = numbers["cmim_error"] = error / patches if patches else None
    added = [w * (numbers.get(f"loss/{name}") or 0.0) for w, name in zip(weights, OBJECTIVES)]
    return sum(added), numbers


def _mean(total: Tensor, count: Tensor) -> float | None:
    return float(total / count) if count else None


def load_visual_tokenizer(name: str, device: torch.device) -> VisualTokenizer:
    """What ``package.module:function`` makes for a device. Raises ValueError where it cannot be found."""
    module, _, function = name.partition(":")
    try:
        make: Callable[[torch.device], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"loss.cmim.visual_tokenizer {name!r} cannot be loaded ({error}); write package.module:function, and put "
            "the package where Python finds it"
        ) from None
    made: VisualTokenizer = make(device)
    return made


def checked_codes(codes: Tensor, pictures: int, patches: int, limit: int) -> Tensor:
    """What a visual tokenizer gave. Raises ValueError where it does not fit the model."""
    if codes.shape != (pictures, patches) or codes.dtype != torch.int64:
        raise ValueError(
            f"loss.cmim.visual_tokenizer gave {list(codes.shape)} of {codes.dtype}; this model's pictures need int64 "
            f"[{pictures}, {patches}], a code a patch"
        )
    if int(codes.min()) < 0 or int(codes.max()) >= limit:
        raise ValueError(
            f"loss.cmim.visual_tokenizer gave codes from {int(codes.min())} to {int(codes.max())}; loss.cmim.codes is "
            f"{limit}, so they go from 0 to {limit - 1}"
        )
    return codes
