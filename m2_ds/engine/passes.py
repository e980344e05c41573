"""How the two passes of a step run: forward for features, backward from their gradients.

Legend: k micro-batches, b pairs of one, C captions a picture, n = C b captions, N loss levels, E embedding.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from m2_ds.engine.clock import Clock
from m2_ds.model.encoder import Outputs
from m2_ds.model.masked import MaskedInputs, MaskedSums
from m2_ds.model.random import Noise

PHASES = ("forward", "exchange", "loss", "recompute", "backward", "update", "pipe")


@dataclass(frozen=True)
class Inputs:
    """Of a micro-batch: ``images`` [b, 3, S, S], ``ids`` and ``mask`` [n, L], noise where anything is random.

    ``masked``: what masked objectives hide of it, in the forward that has a backward.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    image_noise: Noise | None
    text_noise: Noise | None
    captions: int
    masked: MaskedInputs | None = None


@dataclass(frozen=True)
class Forward:
    """``features``: by level, pictures and then each set of captions, [b, E]; the logits' ``scales``, ``biases`` [1].

    ``masked``: the sums [1] of the masked objectives. Or all their gradients.
    """

    features: list[Tensor]
    scales: list[Tensor]
    biases: list[Tensor]
    masked: list[Tensor]

    @classmethod
    def of(cls, out: Outputs, levels: Sequence[int], captions: int) -> "Forward":
        """From what the model gives, at the ``levels`` that the loss looks at."""
        features = []
        for level in levels:
            features += [out.image[level], *out.text[level].unflatten(0, (captions, -1))]
        biases = [] if out.logits.bias is None else [out.logits.bias[level] for level in levels]
        masked = [] if out.masked is None else out.masked.tensors()
        return cls(features, [out.logits.scale[level] for level in levels], biases, masked)

    def tensors(self) -> list[Tensor]:
        return [*self.features, *self.scales, *self.biases, *self.masked]


def surrogate(outputs: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor:
    """A number whose gradients by ``outputs`` are the given ones."""
    return torch.stack([torch.sum(x.to(g.dtype) * g) for x, g in zip(outputs, gradients)]).sum()


class Passes(Protocol):
    sums: dict[int, MaskedSums]  # by micro-batch, of the last step's second pass: without their graph

    def forward(self, inputs: Sequence[Inputs]) -> Iterator[Forward]:
        """Pass 1: features of one micro-batch after another; nothing on ranks that do not end with them."""

    def backward(self, inputs: Sequence[Inputs], gradients: Sequence[Forward] | None) -> Tensor | float | None:
        """Pass 2 and the update; the norm of the gradient before clipping. ``gradients``: None where there is no loss.

        The sum over micro-batches of what they give is the gradient already.
        """


class EnginePasses:
    """Under a plain engine. The last ``kept_graphs`` micro-batches keep their graphs from pass 1 to pass 2; the others
    are computed again. With one micro-batch this is a plain forward and backward."""

    def __init__(self, engine: Any, clock: Clock, levels: list[int], accumulation: int, kept_graphs: int) -> None:
        self.engine, self.clock, self.levels, self.kept_graphs = engine, clock, levels, kept_graphs
        self.coalesce = engine.gradient_accumulation_steps() < accumulation
        # Without ZeRO or bf16 the engine keeps no gradient norm.
        self.plain = engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled()
        self.sums: dict[int, MaskedSums] = {}
        self.tell_norm: Callable[[float], None] | None = None  # before the update, where the engine keeps no norm
        self._graphs: list[Forward | None] = []

    def forward(self, inputs: Sequence[Inputs]) -> Iterator[Forward]:
        kept_from = max(0, len(inputs) - self.kept_graphs)
        self._graphs, self.sums = [], {}
        for number, micro_batch in enumerate(inputs):
            with self.clock("forward"), torch.set_grad_enabled(number >= kept_from):
                out = self._features(number, micro_batch)
            self._graphs.append(out if number >= kept_from else None)
            yield out

    def backward(self, inputs: Sequence[Inputs], gradients: Sequence[Forward] | None) -> Tensor | float | None:
        assert gradients is not None
        graphs = self._graphs
        kept = [number for number, graph in enumerate(graphs) if graph is not None]
        order = [*reversed(kept), *(number for number, graph in enumerate(graphs) if graph is None)]
        once = self.engine.coalesce_grad_reduction() if self.coalesce else contextlib.nullcontext()
        with once:
            for place, number in enumerate(order):
                out, graphs[number] = graphs[number], None
                if out is None:
                    with self.clock("recompute"):
                        out = self._features(number, inputs[number])
                with self.clock("backward"):
                    self.engine.backward(surrogate(out.tensors(), gradients[number].tensors()), scale_wrt_gas=False)
                del out
                if place < len(order) - 1 and not self.coalesce:
                    self.engine.step()
        with self.clock("update"):
            norm = self._plain_norm() if self.plain else None
            if norm is not None and self.tell_norm is not None:
                self.tell_norm(float(norm))
            self.engine.step()
        return self.engine.get_global_grad_norm() if norm is None else norm

    def _features(self, number: int, x: Inputs) -> Forward:
        masked = x.masked if torch.is_grad_enabled() else None  # their loss is local, so it rides on the second pass
        out = self.engine(x.images, x.ids, x.mask, x.image_noise, x.text_noise, masked)
        if out.masked is not None:
            self.sums[number] = out.masked.detach()
        return Forward.of(out, self.levels, x.captions)

    def _plain_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])
