"""The whole run as one typed tree, from a YAML file and dotted overrides, with every check that needs no GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from m2_ds.data.config import DataConfig
from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.loss.config import LossConfig
from m2_ds.model.config import PRESETS, LoraConfig, M2EncoderConfig, checked_pattern
from m2_ds.parallel.config import ParallelConfig
from m2_ds.schema import Settings, load_settings


class ParameterRule(Settings):
    """What differs for parameters whose name matches. Names are the canonical ones (those of the state dict).

    A field that is not set leaves what earlier rules, or none, decided.
    """

    pattern: str = Field(description=r"regular expression, searched in the name: 'backbone\.encoder\..*\.B\.'")
    lr_scale: float | None = Field(None, ge=0, description="factor on the learning rate")
    weight_decay: float | None = Field(None, ge=0, description="instead of optim.weight_decay")
    freeze: bool | None = Field(None, description="true: do not train these; false: an exception from an earlier rule")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return checked_pattern(pattern)


class ScheduleConfig(Settings):
    """Learning rate over steps: linear warm-up from 0, then one of two shapes."""

    kind: Literal["cosine", "constant"] = Field("cosine", description="cosine to the end, or constant with a cool-down")
    warmup_steps: int = Field(0, ge=0)
    cooldown_share: float = Field(0.2, ge=0, le=1, description="constant: last share of the steps, linear to the end")
    final_scale: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a share of optim.lr")


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Settings):
    """AdamW (arXiv 1711.05101). Weight matrices and kernels decay; biases, norms, scales and positions never do."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: matrices and convolutions of layers and stem by orthogonalised momentum, embeddings, heads "
        "and vectors by AdamW, at the same learning rate; needs ZeRO stage 0",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="of muon")
    lr: float = Field(1e-3, gt=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rates fall by this factor a layer from the heads down to the embeddings (BEiT, arXiv "
        "2106.08254); a rule's lr_scale multiplies it. 1: off",
    )
    rules: list[ParameterRule] = Field(
        default_factory=list, description="applied in order; the last that matches and sets a field decides"
    )
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    max_logit_scale: float = Field(100.0, gt=0, description="exp(logit_scale) is clamped to this after each step")
    schedule: ScheduleConfig = ScheduleConfig()


class CheckpointConfig(Settings):
    """When checkpoints are written and which are kept."""

    every: int = Field(1000, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_every: int = Field(
        0, ge=0, description="checkpoints at multiples of this many steps are kept for good; 0: none"
    )
    asynchronous: bool = Field(
        False,
        description="training goes on from a copy in the host's memory while files are written: 12 bytes a trained "
        "and 4 a frozen number, over the data-parallel ranks",
    )
    failures_allowed: int = Field(
        2,
        ge=0,
        description="checkpoints in a row that may fail to be written (a full disk) while an older one is there; the "
        "next due one tries again. 0: the first failure ends the run",
    )


class ProfileConfig(Settings):
    """Steps that torch's profiler records."""

    start: int = Field(ge=1, description="the first traced step, from 1")
    steps: int = Field(5, ge=1, le=100, description="traced steps; a trace grows by megabytes a step")
    ranks: list[Annotated[int, Field(ge=0)]] | Literal["all"] = Field(
        [0], min_length=1, description="ranks that write a trace: [0, 3], or all"
    )

    def takes(self, rank: int) -> bool:
        return self.ranks == "all" or rank in self.ranks


class AnomaliesConfig(Settings):
    """What a step does whose numbers are not finite, or whose gradient is far larger than those before it."""

    policy: Literal["stop", "skip", "roll_back"] = Field(
        "stop",
        description="stop: the run ends; skip: the step's update is not applied; roll_back: the run goes back to its "
        "newest checkpoint and passes over the global batch, then and whenever it goes on again",
    )
    spike_threshold: float = Field(
        0.0,
        ge=0,
        description="a gradient norm this many deviations over the median of the steps before is an anomaly, too; a "
        "deviation is 1.4826 median absolute ones, at least 5% of the median. 0: off; 20 is a start",
    )
    spike_window: int = Field(
        100, ge=10, description="steps that the median is taken over; the first ones only fill it"
    )
    most_in_a_row: int = Field(
        5, ge=1, description="skip: steps in a row; roll_back: returns to one checkpoint; one more ends the run"
    )

    @property
    def watched(self) -> bool:
        """Whether every step is looked at before its update."""
        return self.policy != "stop" or self.spike_threshold > 0


class LogConfig(Settings):
    """Where numbers go. JSONL and TensorBoard are always written."""

    every: int = Field(10, ge=1, description="steps between log lines; numbers are means over them")
    wandb_project: str | None = Field(None, description="also log to this Weights & Biases project (needs wandb)")
    peak_tflops: float | None = Field(
        None, gt=0, description="dense peak of one device for MFU; known GPUs are looked up, a CPU has none"
    )
    profile: ProfileConfig | None = Field(None, description="trace some steps by torch's profiler: {start: 100}")


class EngineConfig(Settings):
    """How the step is carried out."""

    deepspeed: Path = Field(Path("ds_configs/zero1.json"), description="DeepSpeed JSON: ZeRO stage, offload, buckets")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of weights and activations; the loss is fp32 always"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads a rank; None: cores / ranks of this machine")
    kept_graphs: int = Field(
        1,
        ge=1,
        description="with several micro-batches: how many keep the activations of their first forward for backward; "
        "the others are computed a second time (a pipeline computes all of them again)",
    )
    reduce_once: bool = Field(
        True,
        description="with several micro-batches under ZeRO 2 and 3: reduce gradients once a step, at the cost of "
        "holding them whole on every rank; false: after every micro-batch, partitioned",
    )
    apex: bool = Field(False, description="LayerNorm and AdamW by NVIDIA's apex, built with its CUDA extensions")
    fp8: bool = Field(
        False,
        description="matrix products of the layers in fp8, by transformer_engine; needs precision bf16, whole layers "
        "and micro-batches of a multiple of 16 pairs",
    )
    build_ops: bool = Field(False, description="let DeepSpeed compile its CPU ops at first use (needs g++, minutes)")
    timeout_minutes: float = Field(
        30.0,
        gt=0,
        description="a collective that waits longer ends the job, and so does a rank that makes no progress for so "
        "long at the start, in a checkpoint or an evaluation",
    )
    hang_seconds: float = Field(
        600.0,
        ge=0,
        description="a rank that makes no progress for so long in a step ends the job (exit code 76); 0: never",
    )
    silence_seconds: float = Field(
        60.0, gt=0, description="and so does one that gives no sign of life: its process is stopped, or its host lost"
    )


class RunConfig(Settings):
    """One training run."""

    folder: Path = Field(description="run folder: configuration, log, checkpoints, report; made if it does not exist")
    steps: int = Field(gt=0, description="optimizer steps of the whole run")
    global_batch: int = Field(gt=0, description="pairs an optimizer step, over all ranks")
    micro_batch: int | None = Field(
        None, ge=1, description="pairs a rank and forward; a rank's share of the step is cut into these. None: not cut"
    )
    seed: int = Field(0, ge=0, lt=2**31)
    init_from: Path | None = Field(
        None, description="weights to start from: a checkpoint, a canonical folder or a .ckpt"
    )
    init_pictures: int = Field(
        0,
        ge=0,
        description="pictures of the stream by which a conv stem's scales and shifts are set before the first step; "
        "0: none, 256 is enough",
    )
    tokenizer: Path = Field(description="tokenizer folder or sentencepiece .model file")
    loss: LossConfig = LossConfig()
    model: M2EncoderConfig
    lora: LoraConfig | None = Field(
        None, description="train low-rank adapters, and else only what optim.rules un-freeze; {} takes the defaults"
    )
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    anomalies: AnomaliesConfig = AnomaliesConfig()
    log: LogConfig = LogConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and "preset" in value:
            changes = dict(value)
            name = changes.pop("preset")
            if name not in PRESETS:
                raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
            return {**PRESETS[name], **changes}
        return value

    @field_validator("model", mode="after")
    @classmethod
    def _heads(cls, model: M2EncoderConfig, info: ValidationInfo) -> M2EncoderConfig:
        """With the heads that the loss asks for, and no other."""
        loss: LossConfig | None = info.data.get("loss")
        if loss is None:  # which is wrong itself, and told
            return model
        cmim = loss.cmim
        outputs = (cmim.codes if cmim.targets == "codes" else model.patch_values) if cmim.weight else 0
        return model.model_copy(update={"masked_text_head": loss.cmlm.weight > 0, "masked_image_head": outputs})

    @field_validator("data", mode="before")
    @classmethod
    def _same_image_size(cls, value: Any, info: ValidationInfo) -> Any:
        """The model's, where the data block does not say."""
        if isinstance(value, dict) and "image_size" not in value and "model" in info.data:
            return {**value, "image_size": info.data["model"].image_size}
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.data.image_size != self.model.image_size:
            raise ValueError(f"data.image_size is {self.data.image_size}, model.image_size is {self.model.image_size}")
        if self.optim.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"optim.schedule.warmup_steps {self.optim.schedule.warmup_steps} must be less than steps {self.steps}"
            )
        if self.loss.unimodal_weight == 0 and self.loss.vl_weight == 0:
            raise ValueError("loss.unimodal_weight and loss.vl_weight are both 0: there is nothing to train for")
        if self.init_pictures and (self.model.stem != "conv" or self.init_from is not None):
            raise ValueError(
                f"init_pictures is {self.init_pictures}: it needs model.stem conv (here {self.model.stem}) and fresh "
                f"weights (init_from is {self.init_from}); set it to 0"
            )
        if (self.loss.form == "sigmoid") != self.model.logit_bias:
            raise ValueError(
                f"loss.form is {self.loss.form}, model.logit_bias is {self.model.logit_bias}: the sigmoid loss "
                "needs the bias, and no other uses it"
            )
        if self.log.profile is not None and self.log.profile.start > self.steps:
            raise ValueError(f"log.profile.start {self.log.profile.start} lies behind the last step, {self.steps}")
        self._check_layout()
        self._check_masked()
        if self.lora is not None:
            self._check_lora()
        return self

    def _check_masked(self) -> None:
        attentive = self.loss.cmim.weight > 0 and self.loss.cmim.choose == "attentive"
        for found, reason in (
            (self.loss.masked and self.parallel.sequence_parallel, "loss.cmlm and loss.cmim put pictures and captions "
             "in one sequence, which parallel.sequence_parallel cannot cut: set it to false"),
            (attentive and self.parallel.pipeline_parallel_size > 1, "loss.cmim.choose attentive needs embeddings "
             "before the joint sequences start, which a pipeline has at its end: set loss.cmim.choose: random, or "
             "parallel.pipeline_parallel_size: 1"),
            (attentive and self.model.patch_drop > 0, "loss.cmim.choose attentive compares all patches with the "
             "caption, and model.patch_drop leaves some out: set one of them otherwise"),
        ):  # fmt: skip
            if found:
                raise ValueError(reason)

    def _check_lora(self) -> None:
        ranks, stages = self.parallel.tensor_parallel_size, self.parallel.pipeline_parallel_size
        for found, reason in (
            (self.init_from is None, "adapts weights that exist: set init_from"),
            (ranks * stages > 1, f"needs whole layers, and parallel cuts them ({ranks} x {stages}): set both sizes to "
             "1, and a DeepSpeed file of ZeRO stage 3 where the model does not fit"),
            (self.optim.kind == "muon", "trains by AdamW: set optim.kind: adamw"),
            (self.engine.fp8, "has no layers in fp8: set engine.fp8: false"),
            (self.loss.masked, "adapts what the contrastive loss reaches: set loss.cmlm.weight and loss.cmim.weight to "
             "0"),
        ):  # fmt: skip
            if found:
                raise ValueError(f"lora {reason} (or leave lora out)")

    def _check_layout(self) -> None:
        model, ranks, stages = self.model, self.parallel.tensor_parallel_size, self.parallel.pipeline_parallel_size
        for name, width in (("num_heads", model.num_heads), ("feed-forward width", model.ffn_size)):
            if width % ranks:
                fitting = [r for r in range(1, ranks) if model.num_heads % r == 0 and model.ffn_size % r == 0]
                raise ValueError(
                    f"parallel.tensor_parallel_size {ranks} does not divide model.{name} {width}; use one of {fitting}"
                )
        depth = model.num_layers + model.num_vl_layers
        if stages > depth:
            raise ValueError(
                f"parallel.pipeline_parallel_size {stages} is more than the {depth} layers; every stage needs one"
            )
        asked = self.parallel.pipeline_layers
        if asked is not None and (sum(asked) != depth or min(asked) < 1):
            raise ValueError(
                f"parallel.pipeline_layers {asked} hold {sum(asked)} layers; the model has {depth}, and every stage "
                "needs one"
            )
        if stages > 1 and self.loss.vl_weight == 0:
            raise ValueError(
                "loss.vl_weight is 0: the stages behind the backbone would have nothing to learn. Use "
                "parallel.pipeline_parallel_size 1, or a weight"
            )
        if self.engine.fp8 and (self.engine.precision != "bf16" or ranks > 1 or (self.micro_batch or 0) % 16):
            raise ValueError(
                f"engine.fp8 needs engine.precision bf16 (here {self.engine.precision}), "
                f"parallel.tensor_parallel_size 1 (here {ranks}) and a micro_batch that 16 divides (here "
                f"{self.micro_batch})"
            )
        if self.engine.apex and self.optim.kind != "adamw":
            raise ValueError(f"engine.apex has AdamW only, and optim.kind is {self.optim.kind}; set engine.apex: false")
        if self.optim.kind == "muon" and ranks * stages > 1:
            raise ValueError(
                "optim.kind muon works on whole matrices and without ZeRO, and tensor and pipeline parallelism need "
                "ZeRO stage 1; set optim.kind: adamw"
            )

    def checkpoint_due(self, done: int) -> bool:
        """Whether a checkpoint follows step number ``done`` (from 1)."""
        return done == self.steps or (self.checkpoint.every > 0 and done % self.checkpoint.every == 0)

    def evaluation_due(self, done: int) -> bool:
        """Whether an evaluation follows step number ``done`` (from 1)."""
        every = self.evaluation.every
        return bool(self.evaluation.tasks) and (done == self.steps or (every > 0 and done % every == 0))

    def batch_shape(self, data_parallel_size: int) -> tuple[int, int]:
        """(pairs of a micro-batch, micro-batches a rank and step). Raises ValueError where batches do not divide."""
        share, rest = divmod(self.global_batch, data_parallel_size)
        if rest or share == 0:
            below, above = share * data_parallel_size, (share + 1) * data_parallel_size
            raise ValueError(
                f"global_batch {self.global_batch} does not divide over {data_parallel_size} data-parallel ranks; "
                f"use {f'{below} or ' if below else ''}{above}"
            )
        micro = self.micro_batch or share
        if share % micro:
            raise ValueError(
                f"micro_batch {micro} does not divide the {share} pairs of each of {data_parallel_size} ranks; "
                f"use one of {[d for d in range(1, share + 1) if share % d == 0]}"
            )
        return micro, share // micro

    def to_yaml(self) -> str:
        """The resolved configuration; `load_config` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe. ``overrides``: ``optim.lr=1e-3``; values as in YAML, list items by number (``data.sources.0``).

    Raises ValueError that names the file, the field, its value and what would be accepted.
    """
    return load_settings(RunConfig, path, overrides, "recipe")
