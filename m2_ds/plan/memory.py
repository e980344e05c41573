"""Memory of a rank by kind, at the two moments that can be its peak: in the passes, and in the update.

It follows what the engine really holds (DeepSpeed 0.19: stage_1_and_2.py, stage3.py, fp16/unfused_optimizer.py):

- weights e bytes a number, whole up to ZeRO 2; under ZeRO 3 a part, and up to `LIVE` numbers gathered while in use;
- gradients e bytes a number, whole at the end of backward but under ZeRO 2 with k = 1 or ``reduce_once: false``, where
  they are shared out as they are made; then each rank's part (all of them without ZeRO);
- optimizer: fp32 masters and two moments, 12 bytes a number (8 where weights are the masters: fp32 at ZeRO 0 and 3);
- a bucket in which gradients are reduced, and, with more than one rank, the flat copy of it that is sent;
- in the update, a flat copy of the gradients and, in bf16, another in fp32.

On a CPU a buffer counts as far as it has been written to. Legend: k micro-batches, b pairs of one, n = k b own pairs, B
pairs of the contrast group, M matrices of features, E embedding, T numbers that train, N data-parallel ranks.
"""

from dataclasses import dataclass, field

from m2_ds.config import RunConfig
from m2_ds.loss.answers import TILE_COLUMNS, TILE_ROWS
from m2_ds.model.pipeline import parts
from m2_ds.model.stack import Part
from m2_ds.plan.activations import Graph, joint_graph, part_graph
from m2_ds.plan.joint import joint_of
from m2_ds.plan.layout import Candidate, Load, model_of
from m2_ds.plan.weights import Weights, weights_of
from m2_ds.plan.work import BYTES, tokens_of

BUCKET = 50_000_000  # numbers, as every file of ds_configs has it
LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
OVERLAPPING = ("zero2", "zero3")  # files with overlap_comm: two buckets


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, of pipeline stage ``stage``: by kind in the passes and in the update, and on the host."""

    stage: int
    passes: dict[str, float]
    update: dict[str, float]
    host: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def at_peak(self) -> dict[str, float]:
        """By kind at the larger of the two."""
        return max(self.passes, self.update, key=lambda kinds: sum(kinds.values()))

    @property
    def peak(self) -> float:
        return sum(self.at_peak.values())


def stage_parts(config: RunConfig, pipeline: int) -> list[Part]:
    """The part of the model on each stage, cut as the engine cuts it; the recipe's own stages where it has as many."""
    if pipeline == 1:
        return [Part.whole(config.model)]
    from m2_ds.engine.pipeline import stage_sizes  # imports DeepSpeed, seconds

    asked = config.parallel.pipeline_layers
    if asked is not None and len(asked) != pipeline:
        parallel = config.parallel.model_copy(update={"pipeline_layers": None})
        config = config.model_copy(update={"parallel": parallel})
    return parts(config.model, stage_sizes(config, pipeline))


def memory_of(config: RunConfig, candidate: Candidate, load: Load, on_cpu: bool, stages: list[Part]) -> list[Memory]:
    """Of a rank of each stage; ``config``: the recipe, of which ``candidate`` decides the rest."""
    model, precision = model_of(config, candidate), config.engine.precision
    of = tokens_of(model, load, candidate.micro_batch, on_cpu, candidate.tensor if candidate.sequence else 1)
    joint = joint_of(config, load, candidate.micro_batch)
    found = []
    for stage, part in enumerate(stages):
        graph = part_graph(model, part, of, precision, on_cpu, candidate.tensor, candidate.sequence)
        of_joint = None if joint is None else joint_graph(model, part, joint, precision, on_cpu, candidate.tensor)
        held = _Held(weights_of(config, part, candidate.tensor), candidate, BYTES[precision], on_cpu)
        found.append(_of_stage(config, candidate, load, stage, part, graph, of_joint, held))
    return found


@dataclass(frozen=True)
class _Held:
    """Weights, gradients and optimizer of a rank under its ZeRO stage."""

    numbers: Weights
    candidate: Candidate
    element: int
    on_cpu: bool

    @property
    def part(self) -> float:
        """T of this rank's part."""
        return self.numbers.trained / self.candidate.data

    @property
    def weights(self) -> float:
        if self.candidate.stage < 3:
            return self.numbers.all * self.element
        return 0.0 if self.candidate.offload == "everything" else self.numbers.all / self.candidate.data * self.element

    @property
    def gathered(self) -> float:
        """Under ZeRO 3, of weights that are whole while they are used; one rank needs no copy."""
        alone = self.candidate.data == 1 and self.candidate.offload != "everything"
        return 0.0 if self.candidate.stage < 3 or alone else min(self.numbers.all, LIVE) * self.element

    @property
    def master(self) -> int:
        return 8 if self.element == 4 and self.candidate.stage in (0, 3) else 12

    @property
    def optimizer(self) -> float:
        return self.master * (self.part if self.candidate.stage else self.numbers.trained)

    @property
    def gradients(self) -> float:
        """Right before the update."""
        return self.element * (self.part if self.candidate.stage else self.numbers.trained)

    @property
    def whole_gradients(self) -> float:
        return self.numbers.trained * self.element

    def buckets(self, count: int = 1) -> float:
        size = count * BUCKET
        return (min(size, self.numbers.trained) if self.on_cpu else size) * self.element

    @property
    def sent(self) -> float:
        """The flat copy of a bucket that is sent: only where there is someone to send to."""
        return min(BUCKET, self.numbers.trained) * self.element if self.candidate.data > 1 else 0.0


def _of_stage(
    config: RunConfig, candidate: Candidate, load: Load, stage: int, part: Part, graph: Graph, joint: Graph | None,
    held: _Held,
) -> Memory:  # fmt: skip
    offload, k = candidate.offload, candidate.accumulation
    optimizer = held.optimizer if offload == "none" else 0.0
    state = {"weights": held.weights, "optimizer": optimizer}
    data = _inputs(config, candidate, load)
    features = _features(config, candidate, load) if part.is_last else {}
    moments: list[dict[str, float]] = []
    graphs = max(candidate.kept, 1)
    if candidate.pipeline > 1:
        graphs = min(k, candidate.pipeline - stage)
    standing = held.gradients if candidate.stage == 3 and offload == "none" else 0.0
    live = {"gathered weights": held.gathered, "inputs": data, **features}
    buckets = 0.0
    if candidate.stage == 3:
        buckets = held.buckets() + held.sent
    elif candidate.stage == 2 and not held.on_cpu:
        buckets = held.buckets(2 if candidate.zero in OVERLAPPING else 1)
    largest = held.numbers.largest * held.element

    def passing(count: int, standing: float, added: float) -> None:
        """A moment of backward: ``count`` graphs are there, beside gradients that stand and one that is being made.

        Joint sequences, which run last, are given up first; their gradients of all weights then wait for those of
        pictures and captions, which are added to them.
        """
        both = count * graph.kept + (0.0 if joint is None else count * joint.kept)
        kinds = [(both + graph.working, added)]
        if joint is not None:
            kinds = [(both + joint.working, added), (both - joint.kept + graph.working, held.whole_gradients)]
        for activations, made in kinds:
            kinds_now = {"activations": activations, "gradients": standing + made, "buffers": buckets}
            moments.append({**kinds_now, **live})

    # At the start of the first backward pass: everything that was kept, no gradients but that of a vocabulary's scores.
    scored = joint is not None and part.is_last and config.model.masked_text_head
    passing(graphs, standing, largest if scored else 0.0)
    # Where micro-batches follow each other, their gradients meet a graph that is still whole.
    if k > 1:
        passing(graphs if candidate.pipeline > 1 else 1, _accumulated(candidate, held), largest)
    moments.append({**_reduction(candidate, held), "inputs": data})
    passes = max(moments, key=lambda kinds: sum(kinds.values()))
    return Memory(
        stage,
        {**state, **passes},
        {**state, **_update(candidate, held), "inputs": data},
        _host(candidate, held),
        {"graph": graph.kept + (0.0 if joint is None else joint.kept), "working": graph.working},
    )


def _accumulated(candidate: Candidate, held: _Held) -> float:
    """Gradients that stay from one micro-batch to the next."""
    if candidate.stage < 2 or candidate.reduce_once:
        return held.whole_gradients
    return held.gradients if candidate.offload == "none" else 0.0


def _reduction(candidate: Candidate, held: _Held) -> dict[str, float]:
    """At the end of backward, while gradients are summed over ranks and shared out."""
    stage, several = candidate.stage, candidate.data > 1
    if stage == 0:
        copy = held.whole_gradients  # all of them in one flat tensor, whether or not there is someone to send it to
        return {"gradients": held.whole_gradients, "buffers": copy}
    whole = held.whole_gradients
    part = held.gradients if candidate.offload == "none" else 0.0
    piecewise = stage >= 2 and (candidate.accumulation == 1 or not candidate.reduce_once)
    if stage == 3:
        gathered = held.numbers.largest * held.element
        return {
            "gradients": part + (gathered if piecewise else whole),
            "buffers": held.buckets() + held.sent,
            "gathered weights": held.gathered,
        }
    count = 2 if candidate.zero in OVERLAPPING else 1
    if piecewise and held.on_cpu:
        # The first bucket and its copy; or all that buckets have held, the part, and the copy of the last bucket.
        last = held.numbers.trained % BUCKET * held.element if several else 0.0
        return {"gradients": part, "buffers": max(held.buckets() + held.sent - part, held.buckets(count) + last)}
    if piecewise:
        return {"gradients": part, "buffers": held.buckets(count) + held.sent}
    if held.on_cpu:  # gradients are given up as the bucket fills; the part fills as the bucket empties, behind its copy
        return {"gradients": whole, "buffers": max(held.buckets() / candidate.data, held.sent)}
    return {"gradients": whole, "buffers": max(held.buckets(count), part) + held.sent}


def _update(candidate: Candidate, held: _Held) -> dict[str, float]:
    """Flat and widened copies of a rank's gradients; or the norm's fp64 copy of the largest, before them."""
    if candidate.offload != "none":
        return {"gradients": 0.0, "buffers": held.buckets()}
    widened = 4 if held.element == 2 else 0
    if candidate.stage == 0:
        copies: float = widened * held.numbers.trained
    elif candidate.stage == 3:
        copies = (held.element + widened) * min(held.part, LIVE)
    else:
        copies = (held.element + widened) * held.part
    norm = 8 * min(held.numbers.largest, held.part) if candidate.stage else 0
    permanent = held.buckets() if candidate.stage == 3 else 0.0
    return {"gradients": held.gradients, "buffers": max(copies, norm) + permanent}


def _host(candidate: Candidate, held: _Held) -> float:
    """Of one rank, offloaded: masters, moments, fp32 gradients, low-precision copies."""
    if candidate.offload == "none":
        return 0.0
    host = held.part * (12 + 4 + held.element)
    if candidate.offload == "everything":
        host += 2 * held.numbers.all / candidate.data * held.element
    return host


def _inputs(config: RunConfig, candidate: Candidate, load: Load) -> float:
    """Pictures (bytes) and captions (int64, mask and all) of a step's micro-batches."""
    pair = 3 * config.model.image_size**2 + load.captions * load.length * 16
    return float(candidate.accumulation * candidate.micro_batch * pair)


def _features(config: RunConfig, candidate: Candidate, load: Load) -> dict[str, float]:
    """The contrastive loss: gathered features, own ones and their gradients, two tiles."""
    levels = sum(w > 0 for w in (config.loss.unimodal_weight, config.loss.vl_weight))
    row = levels * (1 + load.captions) * config.model.embed_dim
    own = candidate.accumulation * candidate.micro_batch
    columns = candidate.contrastive_batch
    sent = 2 if config.loss.exchange == "bf16" else 4
    gathered = columns * row * sent if columns > own or candidate.tensor > 1 else 0
    tiles = 2 * 4 * min(TILE_ROWS, own) * min(TILE_COLUMNS, columns)
    return {"loss": float(gathered + 3 * own * row * 4 + tiles)}
