"""Every layout that the trainer would take, predicted and ranked.

Candidates are made from what divides; each is predicted from shapes, and the best are checked by what checks a run at
its start: RunConfig, the engine's own refusals, contrast groups over the cluster's nodes. What does not fit into memory
is kept with what it lacks, to say why it is not among the proposals.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from m2_ds.config import RunConfig
from m2_ds.model.config import RecomputePolicy
from m2_ds.model.stack import Part
from m2_ds.parallel.config import contrast_groups
from m2_ds.plan.cluster import Cluster
from m2_ds.plan.layout import ZERO, Candidate, Load
from m2_ds.plan.memory import Memory, memory_of, stage_parts
from m2_ds.plan.time import StepTime, step_time
from m2_ds.plan.traffic import Traffic, traffic_of

MOST_STAGES = 16
MOST_MICRO_BATCH = 4096
TIE = 0.03  # of the step: predictions are no better than to tell less apart
POLICIES: tuple[RecomputePolicy, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Prediction:
    """Of a candidate: memory and traffic of a rank of each stage, seconds of a step."""

    candidate: Candidate
    memory: list[Memory]
    traffic: list[Traffic]
    time: StepTime
    capacity: float  # bytes of a rank that a run may take
    host_capacity: float  # of a rank's share of its node's memory

    @property
    def worst(self) -> Memory:
        """The stage with the highest peak."""
        return max(self.memory, key=lambda m: m.peak)

    @property
    def host(self) -> float:
        return max(m.host for m in self.memory)

    @property
    def fits(self) -> bool:
        return self.worst.peak <= self.capacity and self.host <= self.host_capacity


@dataclass(frozen=True)
class Plan:
    """``fitting``: best first, of each (tensor, pipeline, ZeRO) its best, all checked; ``refused``: candidates that fit
    and that the trainer would not take; ``too_large``: those that do not fit, the fastest of each layout;
    ``looked_at``: how many there were."""

    fitting: list[Prediction]
    too_large: list[Prediction]
    refused: list[tuple[Candidate, str]]
    looked_at: int


class Planner:
    """Predictions for one recipe on one cluster; ``base``: the recipe as it was given, a tree of fields."""

    def __init__(self, base: dict[str, Any], config: RunConfig, cluster: Cluster, load: Load) -> None:
        _refuse(config)
        self.base, self.config, self.cluster, self.load = base, config, cluster, load
        self.on_cpu = cluster.device == "cpu"
        self._stages: dict[int, list[Part]] = {}

    def stages(self, pipeline: int) -> list[Part]:
        if pipeline not in self._stages:
            self._stages[pipeline] = stage_parts(self.config, pipeline)
        return self._stages[pipeline]

    def predict(self, candidate: Candidate, exactly: bool = False) -> Prediction:
        """``exactly``: traffic with the padding of ZeRO's groups."""
        config, load, cluster = self.config, self.load, self.cluster
        stages = self.stages(candidate.pipeline)
        memory = memory_of(config, candidate, load, self.on_cpu, stages)
        traffic = [
            traffic_of(config, candidate, load, self.on_cpu, stages, stage, exactly) for stage in range(len(stages))
        ]
        seconds = step_time(config, candidate, load, cluster, stages, traffic)
        host = 0.0 if cluster.host is None else cluster.host.memory_gb * 1e9 * 0.9 / cluster.ranks_per_node
        return Prediction(candidate, memory, traffic, seconds, (cluster.memory_gb - cluster.reserve_gb) * 1e9, host)

    def search(self, global_batch: int, contrastive_batch: int, wanted: int = 10) -> Plan:
        """The ``wanted`` fastest, of each layout the best. ``contrastive_batch``: least pairs compared with each other.

        Raises ValueError where nothing divides.
        """
        found = [self.predict(c) for c in self.candidates(global_batch, contrastive_batch)]
        if not found:
            raise ValueError(
                f"global_batch {global_batch} divides over no layout of {self.cluster.ranks} ranks; take a multiple of "
                f"{self.cluster.ranks}, or of a power of two below it"
            )
        found.sort(key=lambda p: p.time.total)
        fitting: list[Prediction] = []
        refused: list[tuple[Candidate, str]] = []
        for prediction in _best_of_layouts(_simplest_first([p for p in found if p.fits])):
            if len(fitting) == wanted:
                break
            try:
                self.check(prediction.candidate)
            except ValueError as error:
                refused.append((prediction.candidate, str(error)))
            else:
                fitting.append(prediction)
        return Plan(fitting, _best_of_layouts(p for p in found if not p.fits), refused, len(found))

    def candidates(self, global_batch: int, contrastive_batch: int) -> Iterator[Candidate]:
        cluster, model, cmim = self.cluster, self.config.model, self.config.loss.cmim
        attentive = cmim.weight > 0 and cmim.choose == "attentive"  # masks that a pipeline cannot make
        for tensor in _divisors(cluster.ranks_per_node):
            if model.num_heads % tensor or model.ffn_size % tensor:
                continue
            for pipeline in _divisors(cluster.ranks // tensor):
                if pipeline > min(MOST_STAGES, model.num_layers + model.num_vl_layers):
                    continue
                if pipeline > 1 and attentive:
                    continue
                data = cluster.ranks // tensor // pipeline
                share, rest = divmod(global_batch, data)
                if rest or not share:
                    continue
                group = next((g for g in _divisors(data) if g * share >= contrastive_batch), None)
                if group is None:
                    continue
                yield from self._ways(tensor, pipeline, data, group, share)

    def _ways(self, tensor: int, pipeline: int, data: int, group: int, share: int) -> Iterator[Candidate]:
        """ZeRO, micro-batches and recomputation of one layout."""
        for zero, (stage, offload) in ZERO.items():
            if (stage != 1 and pipeline > 1) or (stage == 0 and tensor > 1):
                continue
            if offload != "none" and self.cluster.host is None:
                continue
            for micro_batch in (m for m in _powers(share) if m <= MOST_MICRO_BATCH):
                k = share // micro_batch
                for recompute in POLICIES:
                    for sequence in (False, True) if tensor > 1 and not self.config.loss.masked else (False,):
                        for once in (True, False) if stage >= 2 and k > 1 else (True,):
                            yield Candidate(
                                tensor, pipeline, data, zero, group, micro_batch, k, recompute, sequence,
                                self.config.engine.kept_graphs, once,
                            )  # fmt: skip

    def recipe(self, candidate: Candidate) -> RunConfig:
        """The candidate's recipe. Raises ValueError where it would be refused."""
        try:
            return RunConfig.model_validate(candidate.tree(self.base))
        except ValidationError as error:
            raise ValueError("; ".join(item["msg"] for item in error.errors())) from None

    def check(self, candidate: Candidate) -> None:
        """What the trainer checks before it builds anything. Raises ValueError with its message."""
        from m2_ds.engine.setup import deepspeed_config  # imports DeepSpeed, seconds
        from m2_ds.parallel.mesh import Mesh

        config = self.recipe(candidate)
        layout = candidate.layout
        last = layout.pipeline - 1
        per_node = self.cluster.ranks_per_node
        nodes = [f"node {layout.rank(0, data, last) // per_node}" for data in range(layout.data)]
        contrast_groups(layout.data, config.parallel.contrast_group, nodes)
        config.batch_shape(layout.data)
        deepspeed_config(config, Mesh.imagined(layout))


def _refuse(config: RunConfig) -> None:
    """What the planner has no formula for."""
    if config.optim.kind != "adamw":
        raise ValueError(f"optim.kind is {config.optim.kind}: the planner counts AdamW's memory and time; set adamw")
    if config.lora is not None:
        raise ValueError("lora is set: the planner knows no adapters; leave it out (they need less of everything)")
    if config.engine.fp8:
        raise ValueError("engine.fp8 is set: the planner knows fp32 and bf16; leave it out")


def _simplest_first(predictions: list[Prediction]) -> list[Prediction]:
    """Of those that are as fast as the fastest within `TIE`, simpler ones first; the others stay in order of time."""
    if not predictions:
        return []
    limit = predictions[0].time.total * (1 + TIE)
    tied = [p for p in predictions if p.time.total <= limit]
    return [*sorted(tied, key=_effort), *predictions[len(tied) :]]


def _effort(prediction: Prediction) -> tuple[object, ...]:
    c = prediction.candidate
    return c.offload != "none", c.stage, c.tensor * c.pipeline, c.sequence, not c.reduce_once, prediction.time.total


def _best_of_layouts(predictions: Iterable[Prediction]) -> list[Prediction]:
    """The first of each (tensor, pipeline, zero) in the order given; offload where nothing fits without it only."""
    seen: dict[tuple[object, ...], Prediction] = {}
    for p in predictions:
        c = p.candidate
        seen.setdefault((c.tensor, c.pipeline, c.zero), p)
    plain = {(t, s, ZERO[str(z)][0]) for t, s, z in seen if ZERO[str(z)][1] == "none"}
    return [p for (t, s, z), p in seen.items() if ZERO[str(z)][1] == "none" or (t, s, ZERO[str(z)][0]) not in plain]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _powers(n: int) -> Sequence[int]:
    """Powers of two that divide n, and n itself."""
    found = [1 << i for i in range(n.bit_length()) if n % (1 << i) == 0]
    return found if n in found else [*found, n]
