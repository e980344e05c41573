"""Steps of a real engine around a fresh model, on random pairs: nothing is read from disk but DeepSpeed's file."""

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from m2_ds.config import RunConfig
from m2_ds.data.batch import PairBatch
from m2_ds.engine.optim import freeze_unreached
from m2_ds.engine.setup import build_engine, build_model, deepspeed_config, opened
from m2_ds.engine.step import ContrastiveStep
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.weights import init_weights
from m2_ds.parallel.collectives import barrier
from m2_ds.parallel.mesh import Mesh
from m2_ds.plan.cluster import PRESETS
from m2_ds.plan.joint import ENDS
from m2_ds.words import Words


def trial_tree(model: dict[str, Any], zero: str, batch: int, micro_batch: int, precision: str) -> dict[str, Any]:
    """A recipe's fields; ``zero``: a file of ds_configs by its name."""
    return {
        "folder": "unused",
        "steps": 10**6,
        "tokenizer": "unused",
        "model": model,
        "global_batch": batch,
        "micro_batch": micro_batch,
        "data": {"sources": [{"path": "unused", "split": "train"}]},
        "engine": {"deepspeed": str(PRESETS.parent / f"{zero}.json"), "precision": precision},
    }


def random_pairs(model: M2EncoderConfig, pairs: int, lengths: tuple[int, int], seed: int) -> PairBatch:
    """``pairs`` pictures, each with one caption of lengths[0] to lengths[1] - 1 tokens; no two of one group or slot.

    A caption begins with token 0 and ends with token 1, as `random_words` has them.
    """
    g = torch.Generator().manual_seed(seed)
    side, longest = model.image_size, lengths[1] - 1
    tokens = torch.randint(*lengths, (1, pairs, 1), generator=g)
    images = torch.randint(0, 256, (pairs, 3, side, side), generator=g).to(torch.uint8)
    ids = torch.randint(ENDS, model.vocab_size, (1, pairs, longest), generator=g)
    ids[..., 0] = 0
    ids.scatter_(2, tokens - 1, 1)
    return PairBatch(
        images=images,
        ids=ids,
        mask=(torch.arange(longest) < tokens).long(),
        language=torch.zeros(1, pairs, dtype=torch.int64),
        group=torch.arange(pairs) + seed * pairs,
        slot=torch.arange(pairs) + seed * pairs,
        keys=[],
        skipped={},
    )


def random_words(model: M2EncoderConfig) -> Words:
    """How the ids of `random_pairs` make words: every token one, but the ends of captions."""
    ids = torch.arange(model.vocab_size)
    return Words(begins=ids >= ENDS, ends=ids < 0, special=ids < ENDS, mask_id=ENDS)


Clock = Literal["wall", "cpu"]
# "cpu": seconds in which any thread of the process worked, for machines on which others work, too.
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class ResidentPeak:
    """Most resident memory of this process since `forget`, beyond what was there when this was made. Bytes.

    Freed tensors leave it where they were mapped on their own, which MALLOC_MMAP_THRESHOLD_ in the environment asks of
    glibc.
    """

    def __init__(self) -> None:
        gc.collect()
        self.before = _status("VmRSS")

    def forget(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return _status("VmHWM") - self.before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Trial:
    """An engine in the layout of ``config``; every rank of ``mesh`` makes one. Close it."""

    def __init__(self, config: RunConfig, mesh: Mesh, lengths: tuple[int, int], clock: Clock = "wall") -> None:
        self.config, self.mesh, self.lengths, self.now = config, mesh, lengths, CLOCKS[clock]
        settings = deepspeed_config(config, mesh)
        module, model = build_model(config, settings, mesh)
        init_weights(model, config.model, config.seed, opened)
        freeze_unreached(model, config.loss)
        self.engine = build_engine(model, config, settings, mesh, module)
        self.engine.train()
        words = random_words(config.model) if config.loss.masked else None
        self.step = ContrastiveStep(self.engine, config, mesh, languages=1, words=words)
        self.step.clock.now = self.now
        self._number = 0

    def run(self, steps: int) -> list[float]:
        """Seconds of each of so many more steps; all ranks begin each together."""
        pairs, k = self.config.batch_shape(self.mesh.data_parallel.size)
        seconds = []
        for _ in range(steps):
            first = (self._number * self.mesh.data_parallel.size + self.mesh.data_parallel.rank) * k
            batches = [random_pairs(self.config.model, pairs, self.lengths, first + i) for i in range(k)]
            self._number += 1
            barrier(self.mesh.world)
            started = self.now()
            result = self.step(batches)
            float(result.loss.sum())  # waits for the device
            seconds.append(self.now() - started)
        return seconds

    def median(self, steps: int) -> dict[str, float]:
        """Seconds of a step, behind two that warm up: ``total``, and of it by phase (m2_ds.engine.passes.PHASES)."""
        self.run(2)
        found: dict[str, list[float]] = {}
        for _ in range(steps):
            self.step.clock.take()
            found.setdefault("total", []).extend(self.run(1))
            for phase, seconds in self.step.clock.take().items():
                found.setdefault(phase, []).append(seconds)
        return {name: statistics.median(values) for name, values in found.items()}

    def close(self) -> None:
        self.engine.destroy()
