"""One rank of benchmarks/model_parallel.py: steps of one layout, or tensor-parallel traffic counted.

Started with the jobs as JSON; they run one after another, in one process group, and rank 0 prints what all ranks found.
"""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import random_steps
import torch
from torch import Tensor, nn

from m2_ds.config import RunConfig
from m2_ds.data.stream import PairBatch
from m2_ds.engine.optim import freeze_unreached
from m2_ds.engine.setup import build_engine, build_model, deepspeed_config, opened, quiet, set_threads
from m2_ds.engine.step import ContrastiveStep
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import init_weights
from m2_ds.parallel.collectives import all_gather_objects, barrier
from m2_ds.parallel.config import ParallelConfig
from m2_ds.parallel.mesh import Mesh

Precision = Literal["fp32", "bf16"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Layout:
    """``balance``: of a pipeline's stages."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    balance: Literal["arithmetic", "memory"] = "arithmetic"

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline

    @property
    def name(self) -> str:
        if self.ranks == 1:
            return "dense"
        parts = [f"{axis} {size}" for axis, size in (("tp", self.tensor), ("pp", self.pipeline)) if size > 1]
        if self.pipeline > 1:
            parts.append(f"balanced by {self.balance}")
        return ", ".join([*parts, *(["sequence parallel"] if self.sequence else [])])

    def config(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_parallel_size=self.tensor,
            pipeline_parallel_size=self.pipeline,
            pipeline_balance=self.balance,
            sequence_parallel=self.sequence,
        )


# -- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """``steps`` optimizer steps of ``micro_batches`` of ``pairs`` each; ``model``: fields of M2EncoderConfig."""

    layout: Layout
    model: dict[str, Any]
    precision: Precision
    pairs: int
    micro_batches: int
    steps: int
    lengths: tuple[int, int]
    lr: float

    def config(self, model: dict[str, Any] | None = None) -> RunConfig:
        batch = self.pairs * self.micro_batches
        config = random_steps.run_config(
            self.model if model is None else model,
            zero=1,
            batch=batch,
            micro_batch=self.pairs,
            precision=self.precision,
        )
        tree = config.model_dump(mode="json")
        tree["parallel"] = self.layout.config().model_dump(mode="json")
        tree["optim"]["lr"] = self.lr
        return RunConfig.model_validate(tree)


@dataclass
class Measured:
    """Of one rank. By kind: storages held right before an update; peaks: above what was there before the model."""

    stage_layers: int
    weights: int
    gradients: int
    optimizer: int
    passes_peak: int  # of steps 2 and on, from their start to the update
    update_peak: int  # of steps 2 and on, in the update
    first_peak: int  # of building the engine and step 1
    losses: list[float]
    seconds: list[float]

    @property
    def peak(self) -> int:
        return max(self.passes_peak, self.update_peak)

    @property
    def held(self) -> int:
        return self.weights + self.gradients + self.optimizer


class Memory:
    """The most memory since `forget`, beyond what was there when this was made.

    Bytes. CUDA: torch's own count. A CPU: the resident set as Linux counts it; freed tensors leave it where they were
    mapped on their own, which MALLOC_MMAP_THRESHOLD_ in the environment asks of glibc.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")

    def forget(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        found = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return found - self.before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def run_steps(job: Steps, mesh: Mesh) -> Measured:
    # The libraries' own memory, and their threads' and communicators', is there before anything is counted.
    small = dataclasses.replace(job, steps=1, pairs=2)
    engine, _, step = _engine(small, small.config({"preset": "test"}), mesh)
    step(_batches(small, step.config, 0))
    engine.destroy()
    del engine, step
    memory = Memory(mesh.device)
    memory.forget()
    config = job.config()
    engine, model, step = _engine(job, config, mesh)
    census: dict[str, int] = {}
    peaks: dict[str, list[int]] = {"passes": [], "update": []}
    update = engine._take_model_step

    def measured_update(*arguments: Any, **named: Any) -> None:
        peaks["passes"].append(memory.peak())
        census.update(census_of(engine, model))
        memory.forget()
        update(*arguments, **named)
        peaks["update"].append(memory.peak())
        memory.forget()

    engine._take_model_step = measured_update
    losses, seconds = [], []
    for number in range(job.steps):
        batches = _batches(job, config, number)
        barrier(mesh.world)
        started = time.perf_counter()
        result = step(batches)
        losses.append(_loss(result.loss, result.count, config))
        seconds.append(time.perf_counter() - started)
    engine.destroy()
    return Measured(
        stage_layers=int(model.part.end - model.part.start),
        passes_peak=max(peaks["passes"][1:]),
        update_peak=max(peaks["update"][1:]),
        first_peak=max(peaks["passes"][0], peaks["update"][0]),
        losses=losses,
        seconds=seconds,
        **census,
    )


def _engine(job: Steps, config: RunConfig, mesh: Mesh) -> tuple[Any, M2Encoder, ContrastiveStep]:
    settings = deepspeed_config(config, mesh)
    module, model = build_model(config, settings, mesh)
    init_weights(model, config.model, config.seed, opened)
    freeze_unreached(model, config.loss)
    engine = build_engine(model, config, settings, mesh, module)
    engine.train()
    return engine, model, ContrastiveStep(engine, config, mesh, languages=1)


def _batches(job: Steps, config: RunConfig, step: int) -> list[PairBatch]:
    seeds = range(step * job.micro_batches, (step + 1) * job.micro_batches)
    return [random_steps.random_pairs(config.model, job.pairs, job.lengths, seed) for seed in seeds]


def _loss(loss: Tensor, count: Tensor, config: RunConfig) -> float:
    """Weighted over levels, as a log line tells it."""
    weights = loss.new_tensor([config.loss.unimodal_weight, config.loss.vl_weight])
    return float((weights * loss.sum(1)).sum() / count.sum())


def census_of(engine: Any, model: nn.Module) -> dict[str, int]:
    """Bytes of the storages that an engine holds, each counted once and by the first kind that has it."""
    wrapper = engine.optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    masters = [p for group in inner.param_groups for p in group["params"]]
    attributes = {name: list(_tensors(value)) for name, value in vars(wrapper).items() if value is not inner}
    of_gradients = [name for name in attributes if "grad" in name or "ipg" in name]
    parameters = list(model.parameters())
    kinds = {
        "weights": [*parameters, *model.buffers()],
        "gradients": [
            *(x.grad for x in [*parameters, *masters] if x.grad is not None),
            *(tensor for name in of_gradients for tensor in attributes[name]),
        ],
        "optimizer": [*masters, *_tensors(dict(inner.state)), *(x for found in attributes.values() for x in found)],
    }
    seen: set[int] = set()
    return {kind: sum(_new_bytes(tensors, seen)) for kind, tensors in kinds.items()}


def _new_bytes(tensors: Iterable[Tensor], seen: set[int]) -> Iterator[int]:
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage.nbytes()


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Those in nested containers, and in the fields of dataclasses in them (a bucket of gradients)."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in [*value.keys(), *value.values()]:
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value), depth - 1)


# -- traffic ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """A forward and backward of one micro-batch of a model."""

    layout: Layout
    model: dict[str, Any]
    precision: Precision
    pairs: int
    lengths: tuple[int, int]


@dataclass
class Counted:
    """Bytes by kind, and what ran: ``lengths``: tokens of each caption, of ``longest`` columns."""

    forward: dict[str, float]
    backward: dict[str, float]
    lengths: list[int]


def count(mesh: Mesh, job: Count) -> Counted:
    """What tensor parallelism sends for the loss's own two levels; ``mesh`` is laid out as the job's layout says."""
    from m2_ds.parallel.tensor import TensorParallelLayers

    config = M2EncoderConfig.model_validate(job.model)
    model = M2Encoder(config, TensorParallelLayers(mesh.tensor, job.layout.sequence))
    init_weights(model, config, seed=0)
    model.to(device=mesh.device, dtype=TYPES[job.precision])
    batch = random_steps.random_pairs(config, job.pairs, job.lengths, seed=0)
    mesh.traffic.take()
    mask = batch.mask[0]
    image, text, *_ = model(*(x.to(mesh.device) for x in (batch.images, batch.ids[0], mask)))
    forward, _ = mesh.traffic.take()
    torch.stack([x.square().sum() for x in (*image, *text)]).sum().backward()
    backward, _ = mesh.traffic.take()
    return Counted(forward, backward, mask.sum(1).tolist())


# -- the process ------------------------------------------------------------------------------------------------------


def work(jobs: list[dict[str, Any]]) -> None:
    quiet()
    mesh, last, found = Mesh.start(), None, []
    for given in jobs:
        kind = Steps if "steps" in given else Count
        layout = Layout(**given["layout"])
        job = kind(**{**given, "layout": layout, "lengths": tuple(given["lengths"])})
        if layout != last:
            mesh, last = mesh.with_layout(layout.config()), layout
        if isinstance(job, Steps):
            set_threads(job.config())
            found.append(dataclasses.asdict(run_steps(job, mesh)))
        else:
            found.append(dataclasses.asdict(count(mesh, job)))
    everyone = all_gather_objects(found, mesh.world)
    if mesh.is_first:
        print(json.dumps(everyone), flush=True)
    mesh.stop()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
