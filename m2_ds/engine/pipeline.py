"""The step's passes on DeepSpeed's pipeline engine, and the model of a pipeline for evaluation.

Pass 1 is its forward-only schedule, pass 2 its 1F1B schedule, whose labels are the gradients of the features. A stage
waits for its neighbours at both ends of either: the bubble, (p - 1) / (k + p - 1) of the time of p equal stages.
Legend: k micro-batches, b pairs of one, n captions, L text tokens, P patches, D width, E embedding.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.utils import partition_balanced
from torch import Tensor, nn

from m2_ds.config import RunConfig
from m2_ds.engine.clock import Clock
from m2_ds.engine.flops import layer_flops
from m2_ds.engine.optim import freeze_unreached
from m2_ds.engine.passes import Forward, Inputs, surrogate
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.layers import Layers
from m2_ds.model.masked import MaskedSums
from m2_ds.model.pipeline import Asked, Stage, features_of, parts
from m2_ds.model.stack import Part
from m2_ds.parallel.collectives import broadcast, receive, send
from m2_ds.parallel.mesh import Mesh

_PHASE_OF = {
    schedule.BackwardPass: "backward",
    schedule.OptimizerStep: "update",
    schedule.ReduceGrads: "update",
    **dict.fromkeys((schedule.SendActivation, schedule.RecvActivation, schedule.SendGrad, schedule.RecvGrad), "pipe"),
}


def stage_sizes(config: RunConfig, stages: int) -> list[int]:
    """Layers of each stage: those asked for, or the ones that balance counted arithmetic or memory."""
    if config.parallel.pipeline_layers is not None:
        return config.parallel.pipeline_layers
    by_memory = config.parallel.pipeline_balance == "memory"
    bounds = partition_balanced(_layer_bytes(config) if by_memory else layer_flops(config.model), stages)
    return [int(end - start) for start, end in zip(bounds, bounds[1:])]


def _layer_bytes(config: RunConfig) -> list[float]:
    """Of each layer's weights, gradients and optimizer; embeddings count to the first, heads to the last."""
    depth = config.model.num_layers + config.model.num_vl_layers
    found = []
    for layer in range(depth):
        with torch.device("meta"):
            model = M2Encoder(config.model, part=Part(layer, layer + 1, layer == 0, layer == depth - 1))
        freeze_unreached(model, config.loss)
        found.append(float(sum(p.numel() * (16 if p.requires_grad else 2) for p in model.parameters())))
    return found


def build_pipeline(config: RunConfig, mesh: Mesh, layers: Layers) -> tuple[PipelineModule, Stage]:
    """DeepSpeed's module, and this rank's stage in it, without values."""
    split = parts(config.model, stage_sizes(config, mesh.pipeline.size))
    unimodal = config.loss.unimodal_weight > 0
    specs = [LayerSpec(Stage, config.model, part, layers, unimodal) for part in split]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how it seeds layers, which it does not
        module = PipelineModule(
            specs,
            topology=PipeModelDataParallelTopology(mesh.pipeline.size, mesh.tensor.size, mesh.data_parallel.size),
            loss_fn=surrogate,
            partition_method="uniform",
            dynamic_shape=True,
        )
    (stage,) = module.forward_funcs
    assert isinstance(stage, Stage) and stage.part == split[mesh.pipeline.rank]
    return module, stage


class PipelinePasses:
    """Under a pipeline engine. No graph is kept: pass 2 computes every micro-batch again."""

    def __init__(self, engine: Any, stage: Stage, clock: Clock, levels: list[int]) -> None:
        self.engine, self.stage, self.clock, self.levels = engine, stage, clock, levels
        self.sums: dict[int, MaskedSums] = {}
        self.unimodal = 0 in levels
        engine._INSTRUCTION_MAP = {
            kind: self._timed(kind, call) for kind, call in type(engine)._INSTRUCTION_MAP.items()
        }
        self._forward_phase = "forward"

    def forward(self, inputs: Sequence[Inputs]) -> Iterator[Forward]:
        self._forward_phase = "forward"
        nothing = torch.zeros(1)
        self.engine.total_loss = None  # the last update's: to a number it would add features
        outputs = self.engine.eval_batch(
            iter([(self._pictures(x), nothing) for x in inputs]),
            compute_loss=False, reduce_output=None, bcast_loss=False,
        )  # fmt: skip
        if self.engine.is_last_stage():
            for micro_batch, out in zip(inputs, outputs):
                yield Forward.of(features_of(out, self.unimodal), self.levels, micro_batch.captions)

    def backward(self, inputs: Sequence[Inputs], gradients: Sequence[Forward] | None) -> Tensor | float | None:
        self._forward_phase = "recompute"
        labels: list[Any] = [torch.zeros(1)] * len(inputs)
        if gradients is not None:
            labels = [self._labels(x, micro_batch.captions) for x, micro_batch in zip(gradients, inputs)]
            self.stage.asked.extend(Asked(x.images, x.ids, x.masked) for x in inputs if x.masked is not None)
        self.engine.train_batch(
            iter([((*self._pictures(x), *self._joint(x)), label) for x, label in zip(inputs, labels)])
        )
        self.sums = dict(enumerate(self.stage.sums))
        self.stage.sums.clear()
        return self.engine.get_global_grad_norm()

    def _labels(self, gradients: Forward, captions: int) -> tuple[Tensor, ...]:
        """Gradients in the order of the last stage's outputs; DeepSpeed will divide by the number of micro-batches."""
        k = self.engine.gradient_accumulation_steps()
        each = 1 + captions
        found = []
        for level in range(len(self.levels)):
            image, *text = gradients.features[level * each : (level + 1) * each]
            found += [k * image, k * torch.cat(text)]
        logits = [*self._both(gradients.scales), *self._both(gradients.biases)]
        return (*found, *(k * x for x in logits), *(k * x for x in gradients.masked))

    def _both(self, of_levels: list[Tensor]) -> list[Tensor]:
        """A logit parameter of a level that the loss does not look at gets a gradient of zero."""
        if len(of_levels) == 1:
            return [torch.zeros_like(of_levels[0]), of_levels[0]]
        return of_levels

    def _pictures(self, micro_batch: Inputs) -> tuple[Tensor, ...]:
        images, mask = micro_batch.images, micro_batch.mask.to(torch.uint8)
        keys = [
            torch.zeros(len(x), dtype=torch.int64, device=x.device) if noise is None else noise.keys
            for x, noise in ((images, micro_batch.image_noise), (mask, micro_batch.text_noise))
        ]
        return (images, micro_batch.ids, mask, *keys)

    def _joint(self, micro_batch: Inputs) -> tuple[Tensor, ...]:
        masked = micro_batch.masked
        if masked is None:
            return ()
        ids, patches = masked.ids(micro_batch.ids), masked.hidden_patches()
        if patches is None:
            patches = ids.new_zeros(len(ids), 1)
        return ids, patches.to(torch.uint8)

    def _timed(self, kind: type, call: Callable[..., None]) -> Callable[..., None]:
        def timed(engine: Any, **arguments: Any) -> None:
            phase = self._forward_phase if kind is schedule.ForwardPass else _PHASE_OF.get(kind)
            with contextlib.nullcontext() if phase is None else self.clock(phase):
                call(engine, **arguments)

        return timed


class StagedEncoder:
    """Embeddings from the stages of a pipeline, whose ranks all call it with the same inputs and get the same."""

    def __init__(self, stage: Stage, mesh: Mesh) -> None:
        self.stage, self.pipeline = stage, mesh.pipeline

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.stage.parameters()

    def encode_image(self, images: Tensor) -> Tensor:
        """[b, 3, S, S] -> unit vectors [b, E]."""
        stage = self.stage
        x = (
            stage.image_tokens(images)
            if stage.part.is_first
            else self._receive(len(images), stage.config.num_patches + 1)
        )
        x, _ = stage.image_layers(x)
        return self._end(x, len(images), lambda last: stage.model.itc_vl_image_proj(last))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[n, L], [n, L] -> unit vectors [n, E]."""
        stage = self.stage
        x = stage.text_tokens(ids) if stage.part.is_first else self._receive(*ids.shape)
        x, _ = stage.text_layers(x, mask.bool())
        return self._end(x, len(ids), lambda last: stage.model.itc_vl_text_proj(last))

    def _receive(self, samples: int, tokens: int) -> Tensor:
        weight = next(self.parameters())
        out = weight.new_empty(samples, tokens, self.stage.config.hidden_size)
        return receive(out, self.pipeline.rank - 1, self.pipeline, "evaluation")

    def _end(self, x: Tensor, samples: int, head: Callable[[Tensor], Tensor]) -> Tensor:
        features = x.new_empty(samples, self.stage.config.embed_dim, dtype=torch.float32)
        if self.stage.part.is_last:
            features = head(x).float()
        else:
            send(x, self.pipeline.rank + 1, self.pipeline, "evaluation")
        return broadcast(features, self.pipeline, self.pipeline.size - 1, "evaluation")
