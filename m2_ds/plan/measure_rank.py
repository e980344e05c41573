"""What one rank of ``m2 plan --measure`` times, while all ranks do the same: layers, products, updates, collectives;
and steps of real engines.

Legend: N tokens, D width, T tokens of a sequence.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2_ds.config import RunConfig
from m2_ds.engine.setup import quiet
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.layers import WHOLE
from m2_ds.model.multiway import ALL_A, MultiwayLayer, attend
from m2_ds.parallel.collectives import all_gather_rows, all_reduce_sum, barrier, receive, reduce_scatter_rows, send
from m2_ds.parallel.mesh import Mesh
from m2_ds.plan.layout import Candidate, Load
from m2_ds.plan.memory import memory_of, stage_parts
from m2_ds.plan.trial import CLOCKS, Clock, ResidentPeak, Trial, trial_tree

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTHS = (192, 384, 768)
SAMPLES, LENGTH, DEPTH = 24, 50, 3
HEAD, HEADS = 64, 4
LENGTHS = (16, LENGTH, 200)
LARGE, SMALL = 4_000_000, 256  # numbers of a message
UPDATED = 20_000_000  # over 32 MB in bf16, too: as with real buckets, every buffer is new memory, whose pages cost


@dataclass
class Timed:
    """Median seconds of a forward and of a backward."""

    forward: float
    backward: float


class Rank:
    """Times on this rank, in step with the others."""

    def __init__(self, mesh: Mesh, budget_s: float, clock: Clock) -> None:
        self.mesh, self.budget_s, self.now = mesh, budget_s, CLOCKS[clock]

    def work(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for precision, dtype in DTYPES.items():
            found[precision] = {
                "layers": {width: vars(self.layers(width, SAMPLES, LENGTH, dtype)) for width in WIDTHS},
                "products": {width: vars(self.products(width, SAMPLES * LENGTH, dtype)) for width in WIDTHS},
                "attention": {length: vars(self.attention(length, dtype)) for length in LENGTHS},
                "dispatch": vars(self.layers(HEAD, 2, 2, dtype)),
                **self.update(dtype),
            }
        if self.mesh.world_size > 1:
            found["collectives"] = {str(size): self.collectives(size) for size in (SMALL, LARGE)}
        return found

    def repeated(self, call: Callable[[], Timed]) -> Timed:
        """Medians of as many calls as the time allows; all ranks make as many."""
        call()
        barrier(self.mesh.world)
        started = self.now()
        call()
        once = torch.tensor([self.now() - started])
        longest = float(all_reduce_sum(once, self.mesh.world, "control")) / self.mesh.world_size
        count = max(3, min(200, int(self.budget_s / max(longest, 1e-6))))
        barrier(self.mesh.world)
        times = [call() for _ in range(count)]
        return Timed(*(statistics.median(getattr(t, side) for t in times) for side in ("forward", "backward")))

    def layers(self, width: int, samples: int, length: int, dtype: torch.dtype) -> Timed:
        """Of one of `DEPTH` layers run one after another, so that memory is used as a model uses it."""
        config = M2EncoderConfig(hidden_size=width, num_heads=width // HEAD, num_layers=DEPTH)
        stack = nn.ModuleList(MultiwayLayer(config, WHOLE, i) for i in range(DEPTH)).to(dtype)
        x = torch.randn(samples, length, width).to(dtype).requires_grad_()

        def once() -> Timed:
            stack.zero_grad()
            started = self.now()
            y = x
            for layer in stack:
                y = layer(y, ALL_A)
            middle = self.now()
            y.backward(torch.ones_like(y))
            return Timed((middle - started) / DEPTH, (self.now() - middle) / DEPTH)

        return self.repeated(once)

    def products(self, width: int, tokens: int, dtype: torch.dtype) -> Timed:
        """The four products of a layer, with what they need of gradients."""
        shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        weights = [torch.randn(out, into).mul_(0.01).to(dtype).requires_grad_() for into, out in shapes]
        inputs = [torch.randn(tokens, into).to(dtype).requires_grad_() for into, _ in shapes]

        def once() -> Timed:
            started = self.now()
            outputs = [F.linear(x, w) for x, w in zip(inputs, weights)]
            middle = self.now()
            torch.autograd.grad(outputs, [*inputs, *weights], outputs)
            return Timed(middle - started, self.now() - middle)

        return self.repeated(once)

    def attention(self, length: int, dtype: torch.dtype) -> Timed:
        shape = (SAMPLES, HEADS, length, HEAD)
        q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))

        def once() -> Timed:
            started = self.now()
            out = attend(q, k, v, None)
            middle = self.now()
            torch.autograd.grad(out, [q, k, v], out)
            return Timed(middle - started, self.now() - middle)

        return self.repeated(once)

    def update(self, dtype: torch.dtype) -> dict[str, float]:
        """Seconds a parameter of what ZeRO 1 does with a gradient: into a bucket and out of it; norm in fp64, flat and
        widened copies, clipping, AdamW, the new weight."""
        gradient = torch.randn(UPDATED).to(dtype)
        weight = torch.zeros(UPDATED, dtype=dtype)
        master = nn.Parameter(torch.zeros(UPDATED))
        optimizer = torch.optim.AdamW([master], fused=True)

        def once() -> Timed:
            started = self.now()
            bucket = torch.empty(UPDATED, dtype=dtype)
            bucket.copy_(gradient)
            bucket.div_(2)
            part = torch.empty(UPDATED, dtype=dtype)
            part.copy_(bucket)
            middle = self.now()
            part.double().norm(2)
            flat = torch.cat([part[: UPDATED // 2], part[UPDATED // 2 :]])
            master.grad = flat.float()
            master.grad.mul_(0.5)
            optimizer.step()
            master.grad = None
            weight.copy_(master.data)
            return Timed(middle - started, self.now() - middle)

        timed = self.repeated(once)
        return {"gradient_s": timed.forward / UPDATED, "update_s": timed.backward / UPDATED}

    def collectives(self, size: int) -> dict[str, float]:
        """Seconds of each collective of ``size`` fp32 numbers (of bf16 as many bytes), on all ranks."""
        world = self.mesh.world
        x, half = torch.ones(size), torch.ones(2 * size, dtype=torch.bfloat16)
        rows = torch.ones(world.size * (size // world.size), 1)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: all_reduce_sum(x, world, "control"),
            "all_reduce_bf16": lambda: all_reduce_sum(half, world, "control"),
            "all_gather": lambda: all_gather_rows(x, world, "control"),
            "reduce_scatter": lambda: reduce_scatter_rows(rows, world, "control"),
            "send": lambda: self._pass_on(x),
        }
        return {name: self.repeated(partial(self._whole, call)).forward for name, call in calls.items()}

    def _whole(self, call: Callable[[], object]) -> Timed:
        started = self.now()
        call()
        return Timed(self.now() - started, 0.0)

    def _pass_on(self, x: Tensor) -> None:
        """From every even rank to the next, and back: two messages, of which one is timed as half."""
        world = self.mesh.world
        other = world.rank ^ 1
        if other >= world.size:
            return
        if world.rank % 2 == 0:
            send(x, other, world, "control")
            receive(x, other, world, "control")
        else:
            receive(x, other, world, "control")
            send(x, other, world, "control")


# -- steps of a real engine ------------------------------------------------------------------------------------------

_RESERVE = {
    "preset": "test", "hidden_size": 512, "num_heads": 8, "embed_dim": 32, "image_size": 64, "vocab_size": 8000,
}  # fmt: skip
TOKENS = (6, 17)  # of captions


def trials(mesh: Mesh, trees: list[dict[str, Any]], steps: int, clock: Clock) -> list[dict[str, float]]:
    """Of each recipe, seconds of a step and of its phases. Their layouts are the same."""
    found = []
    for tree in trees:
        config = RunConfig.model_validate(tree)
        trial = Trial(config, mesh.with_layout(config.parallel), TOKENS, clock)
        found.append(trial.median(steps))
        trial.close()
    return found


def reserve(mesh: Mesh) -> int:
    """Bytes that a process takes beside what the formula counts, of one model, behind a first one that is small."""
    found = 0.0
    for model in ({"preset": "test"}, _RESERVE):
        config = RunConfig.model_validate(trial_tree(model, "zero1", 16, 8, "fp32"))
        peak = ResidentPeak()
        peak.forget()
        trial = Trial(config, mesh, TOKENS)
        trial.run(3)
        found = peak.peak()
        trial.close()
        candidate = Candidate.of(config, 1)
        predicted = memory_of(config, candidate, Load(1, 16, 11.5), True, stage_parts(config, 1))[0].peak
    return int(found - predicted)


def main(what: str, budget_s: float, clock: Clock, trees: list[dict[str, Any]]) -> None:
    quiet()
    mesh = Mesh.start()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    answer: object
    if what == "reserve":
        answer = {"bytes": reserve(mesh)}
    elif what == "trials":
        answer = trials(mesh, trees, max(3, int(12 * budget_s)), clock)
    else:
        answer = Rank(mesh, budget_s, clock).work()
    if mesh.is_first:
        print(json.dumps(answer), flush=True)
    mesh.stop()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), "cpu" if sys.argv[3] == "cpu" else "wall", json.loads(sys.argv[4]))
