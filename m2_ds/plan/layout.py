"""One way to run a recipe: what a planner may choose, and the recipe that asks for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2_ds.config import RunConfig
from m2_ds.model.config import M2EncoderConfig, RecomputePolicy
from m2_ds.parallel.config import Layout, contrast_groups

DS_CONFIGS = Path("ds_configs")
# DeepSpeed's files by name: ZeRO stage, what lies on the host.
ZERO: dict[str, tuple[int, str]] = {
    "zero0": (0, "none"),
    "zero1": (1, "none"),
    "zero2": (2, "none"),
    "zero2_offload": (2, "optimizer"),
    "zero3": (3, "none"),
    "zero3_offload": (3, "everything"),
}


@dataclass(frozen=True)
class Load:
    """What a step's pictures and captions are like: ``captions`` a picture, ``length`` tokens of the longest caption of
    a micro-batch, ``mean_length`` of the average one (a CPU computes no padding)."""

    captions: int
    length: int
    mean_length: float

    @classmethod
    def of(cls, config: RunConfig, length: int | None = None, mean_length: float | None = None) -> "Load":
        """By default the longest captions that the model takes, all of them: an upper bound."""
        captions = len(config.data.languages) if config.data.captions == "each" else 1
        longest = length or config.model.max_text_length
        if not 1 < longest <= config.model.max_text_length:
            raise ValueError(
                f"captions of {longest} tokens: the model takes 2 to {config.model.max_text_length} "
                "(model.max_text_length)"
            )
        mean = mean_length or longest
        if not 1 <= mean <= longest:
            raise ValueError(f"captions of {mean:g} tokens on average, {longest} at most: the mean must lie below")
        return cls(captions, longest, mean)


@dataclass(frozen=True)
class Candidate:
    """``data`` data-parallel ranks, ``group`` of them compared with each other; ``zero`` a name of `ZERO`."""

    tensor: int
    pipeline: int
    data: int
    zero: str
    group: int
    micro_batch: int
    accumulation: int
    recompute: RecomputePolicy
    sequence: bool = False
    kept_graphs: int = 1
    reduce_once: bool = True

    @classmethod
    def of(cls, config: RunConfig, ranks: int) -> "Candidate":
        """The way that a recipe goes. Raises ValueError where it does not divide."""
        layout = Layout.of(config.parallel, ranks)
        micro_batch, accumulation = config.batch_shape(layout.data)
        groups = contrast_groups(layout.data, config.parallel.contrast_group, ["node"] * layout.data)
        zero = config.engine.deepspeed.stem
        if zero not in ZERO:
            raise ValueError(
                f"engine.deepspeed: the planner knows {', '.join(ZERO)} of {DS_CONFIGS}, not {config.engine.deepspeed}"
            )
        return cls(
            layout.tensor, layout.pipeline, layout.data, zero, len(groups[0]), micro_batch, accumulation,
            config.model.recompute, config.parallel.sequence_parallel, config.engine.kept_graphs,
            config.engine.reduce_once,
        )  # fmt: skip

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def stage(self) -> int:
        return ZERO[self.zero][0]

    @property
    def offload(self) -> str:
        return ZERO[self.zero][1]

    @property
    def kept(self) -> int:
        """Micro-batches whose graph of pass 1 serves pass 2."""
        return 0 if self.pipeline > 1 else min(self.kept_graphs, self.accumulation)

    @property
    def layout(self) -> Layout:
        return Layout(self.tensor, self.data, self.pipeline)

    @property
    def contrastive_batch(self) -> int:
        return self.group * self.accumulation * self.micro_batch

    def tree(self, base: dict[str, Any]) -> dict[str, Any]:
        """A recipe's fields with this way of running them."""
        parallel = {
            **base.get("parallel", {}),
            "tensor_parallel_size": self.tensor,
            "pipeline_parallel_size": self.pipeline,
            "sequence_parallel": self.sequence,
            "contrast_group": {"size": self.group},
        }
        if len(parallel.get("pipeline_layers") or []) != self.pipeline:
            parallel.pop("pipeline_layers", None)
        engine = {
            **base.get("engine", {}),
            "deepspeed": str(DS_CONFIGS / f"{self.zero}.json"),
            "kept_graphs": self.kept_graphs,
            "reduce_once": self.reduce_once,
        }
        return {
            **base,
            "global_batch": self.data * self.accumulation * self.micro_batch,
            "micro_batch": self.micro_batch,
            "model": {**base["model"], "recompute": self.recompute},
            "parallel": parallel,
            "engine": engine,
        }

    @property
    def name(self) -> str:
        """'tp 2, pp 1, dp 128, zero1, g 128, k 2 x 64, full': a row's words in a sentence."""
        parts = [f"tp {self.tensor}{' sp' * self.sequence}", f"pp {self.pipeline}", f"dp {self.data}", self.zero]
        parts += [f"g {self.group}", f"k {self.accumulation} x {self.micro_batch}", f"recompute {self.recompute}"]
        return ", ".join([*parts, *(["reduced each micro-batch"] if not self.reduce_once else [])])


def model_of(config: RunConfig, candidate: Candidate) -> M2EncoderConfig:
    """The recipe's model as the candidate runs it."""
    return config.model.model_copy(update={"recompute": candidate.recompute})
