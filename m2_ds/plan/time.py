"""Seconds of an optimizer step by part, from a rank's work, its traffic and a cluster's speeds.

Every rank works at the speed of its stage, and a pipeline at that of its slowest: k micro-batches take k times the
slowest stage's time in each of the two passes, and once that of every other stage, which is the bubble. Nothing
overlaps but what the cluster says of ZeRO 2 and 3. Legend: k micro-batches, p stages.
"""

from dataclasses import dataclass, replace

from m2_ds.config import RunConfig
from m2_ds.model.stack import Part
from m2_ds.plan.cluster import Arithmetic, Cluster
from m2_ds.plan.joint import head_work, joint_of, joint_work, scores_again
from m2_ds.plan.layout import Candidate, Load, model_of
from m2_ds.plan.network import Network
from m2_ds.plan.traffic import Traffic
from m2_ds.plan.weights import Weights, weights_of
from m2_ds.plan.work import BYTES, Work, loss_work, part_work, tokens_of

PASSES = (
    "forward", "second forward", "recomputation", "backward", "masked forward", "masked recomputation",
    "masked backward", "send in passes", "bubble",
)  # fmt: skip
SEPARATE = ("tensor parallel", "tensor parallel norms", "pipeline")  # in the passes, micro-batch by micro-batch
# A bucket that is sent is copied to a flat tensor and back, beside into the bucket, divided and out of it.
FLAT_COPIES = 2 / 3
HOST_BYTES = 60  # that an update on the host reads and writes, a parameter
ACCUMULATION_BYTES = 3  # in units of a gradient: both are read, the sum is written


@dataclass(frozen=True)
class StepTime:
    """Seconds by part; they add up to the step's."""

    parts: dict[str, float]
    operations: float  # forward and backward of the model, recomputation not counted, of all ranks
    ranks: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def communication(self) -> float:
        return sum(s for name, s in self.parts.items() if name.startswith("send "))

    @property
    def bubble(self) -> float:
        """Share of the passes in which ranks wait for other stages."""
        return self.parts.get("bubble", 0.0) / sum(self.parts.get(name, 0.0) for name in PASSES)

    def tflops(self) -> float:
        """Of a rank."""
        return self.operations / self.ranks / self.total / 1e12


def step_time(
    config: RunConfig, candidate: Candidate, load: Load, cluster: Cluster, stages: list[Part], traffic: list[Traffic]
) -> StepTime:
    """``traffic``: of a rank of each stage."""
    speeds = cluster.for_precision(config.engine.precision)
    c, k = candidate, candidate.accumulation
    model, element, on_cpu = model_of(config, c), BYTES[config.engine.precision], cluster.device == "cpu"
    of = tokens_of(model, load, c.micro_batch, on_cpu, c.tensor if c.sequence else 1)
    network = Network(cluster, c, config.engine.precision)
    width = model.hidden_size / c.tensor**0.5  # a product cut over r ranks is about as fast as one of this width
    joint = joint_of(config, load, c.micro_batch)
    working, by_stage = 0.0, []
    for part, sent in zip(stages, traffic):
        work = part_work(model, part, of, element, c.tensor, c.sequence)
        working += work.operations * c.tensor
        found = _Passes.of(work, speeds, width, c)
        if k > 1:
            trained = weights_of(config, part, c.tensor).trained
            found.backward += ACCUMULATION_BYTES * trained * element / (speeds.pointwise_backward_gbs * 1e9)
        inside = sum(network.seconds(x, sent.sent.get(x, 0), sent.messages.get(x, 0)) for x in SEPARATE)
        of_joint = _Passes(0.0, 0.0, 0.0)
        if joint is not None:
            working += (joint_work(model, part, joint, element) + head_work(model, part, joint, element)).operations
            of_joint = _Passes.of(joint_work(model, part, joint, element, c.tensor), speeds, width, c)
            heads = _seconds(head_work(model, part, joint, element, c.tensor), speeds, width, False)
            again, _ = _seconds(scores_again(model, part, joint, c.tensor), speeds, width, False)
            of_joint.forward += heads[0]
            of_joint.backward += heads[1] + again
        by_stage.append(
            {
                "forward": k * found.forward,
                "second forward": (k - c.kept) * found.forward,
                "recomputation": k * found.repeated,
                "backward": k * found.backward,
                "masked forward": k * of_joint.forward,
                "masked recomputation": k * of_joint.repeated,
                "masked backward": k * of_joint.backward,
                "send in passes": inside,
            }
        )
    busy = [sum(times.values()) for times in by_stage]
    parts = dict(by_stage[busy.index(max(busy))])
    parts["bubble"] = (sum(busy) - max(busy)) / k
    parts["loss"] = _loss(config, c, load, cluster)
    numbers = [weights_of(config, part, c.tensor) for part in stages]
    parts["update"] = max(_update(n, c, cluster, speeds, element) for n in numbers)
    parts["engine"] = speeds.step_ms / 1e3 + max(n.tensors for n in numbers) * speeds.tensor_us / 1e6
    kinds = {kind for sent in traffic for kind in sent.sent if kind not in SEPARATE}
    for kind in sorted(kinds):
        each = [network.seconds(kind, t.sent.get(kind, 0), t.messages.get(kind, 0)) for t in traffic]
        parts[f"send {kind}"] = max(each)
    if c.stage == 3 and speeds.partitioned is not None and c.data > 1:
        sent = max(traffic, key=lambda t: t.sent.get("parameters", 0))
        gathered = sent.sent["parameters"] * c.data / (c.data - 1) / element
        once = speeds.partitioned.gather_ns / 1e9, speeds.partitioned.gather_us / 1e6
        parts["send parameters"] = gathered * once[0] + sent.messages["parameters"] * once[1]
    _hide(parts, c, cluster)
    return StepTime({name: s for name, s in parts.items() if s > 0}, 3 * working * k * c.data, c.ranks)


@dataclass
class _Passes:
    """Seconds of a micro-batch's forward and backward, and of what recomputation repeats of the forward."""

    forward: float
    backward: float
    repeated: float

    @classmethod
    def of(cls, work: Work, speeds: Arithmetic, width: float, c: Candidate) -> "_Passes":
        forward, backward = _seconds(work, speeds, width, c.tensor > 1)
        # Selective recomputation leaves out products: what is computed again is the rest of a forward.
        rest = replace(work, products=0.0)
        repeated = {"none": 0.0, "selective": _seconds(rest, speeds, width, c.tensor > 1)[0], "full": forward}
        return cls(forward, backward, repeated[c.recompute])


def _seconds(work: Work, speeds: Arithmetic, width: float, cut: bool) -> tuple[float, float]:
    """Of a forward and of a backward of one micro-batch; ``cut``: tensor-parallel ranks share the layers."""
    forward, backward = speeds.product_tflops(width)
    attention = [(x / 1e12, speeds.attention_tflops(length)) for length, x in work.attention.items()]
    return (
        work.products / forward / 1e12
        + sum(x / rates[0] for x, rates in attention)
        + work.pointwise / speeds.pointwise_forward_gbs / 1e9
        + work.launches * (speeds.layer_forward_us + cut * speeds.cut_layer_forward_us) / 1e6,
        2 * work.products / backward / 1e12
        + sum(2 * x / rates[1] for x, rates in attention)
        + work.pointwise_backward / speeds.pointwise_backward_gbs / 1e9
        + work.launches * (speeds.layer_backward_us + cut * speeds.cut_layer_backward_us) / 1e6,
    )


def _loss(config: RunConfig, c: Candidate, load: Load, cluster: Cluster) -> float:
    """In fp32, on the last stage; its products are as wide as the embeddings."""
    levels = sum(w > 0 for w in (config.loss.unimodal_weight, config.loss.vl_weight))
    own = c.accumulation * -(-c.micro_batch // c.tensor)
    alone = c.group * c.tensor == 1
    operations, moved = loss_work(config.model, own, c.contrastive_batch, load.captions, levels, alone)
    speeds = cluster.arithmetic.get("fp32") or cluster.for_precision(config.engine.precision)
    products = speeds.product_tflops(config.model.embed_dim)[0]
    return operations / products / 1e12 + moved / speeds.pointwise_forward_gbs / 1e9


def _update(weights: Weights, c: Candidate, cluster: Cluster, speeds: Arithmetic, element: int) -> float:
    """Gradients through the bucket, and the numbers that a rank updates; offloaded, on the host, behind the bus.

    ZeRO 0, which has no bucket and updates all numbers where they stand, and ZeRO 3 may have speeds of their own.
    """
    trained = weights.trained
    if c.stage == 0 and speeds.whole_update_ns is not None:
        return trained * speeds.whole_update_ns / 1e9
    times = c.accumulation if c.stage >= 2 and not c.reduce_once else 1
    if c.stage == 3 and c.data > 1 and c.offload == "none" and (zero3 := speeds.partitioned) is not None:
        again = (times - 1) * speeds.gradient_ns  # what is measured has one reduction in it
        return trained * (zero3.update_ns + again) / 1e9 + weights.tensors * zero3.tensor_us / 1e6
    own = trained / (c.data if c.stage else 1)
    gradients = times * trained * speeds.gradient_ns / 1e9
    if c.data > 1 and c.stage < 3:
        gradients *= 1 + FLAT_COPIES
    if c.offload == "none":
        return gradients + own * speeds.update_ns / 1e9
    host = cluster.host
    assert host is not None
    ranks = min(cluster.ranks_per_node, c.ranks)
    moved = own * 2 * element / host.to_device_gbs / 1e9
    if c.offload == "everything":  # weights come for every pass
        moved += (2 * c.accumulation - c.kept + c.accumulation) * own * element / host.to_device_gbs / 1e9
    return gradients + moved + own * HOST_BYTES * ranks / host.bandwidth_gbs / 1e9


def _hide(parts: dict[str, float], c: Candidate, cluster: Cluster) -> None:
    """Take from ZeRO 2 and 3's collectives what goes on behind backward passes, where gradients are summed there."""
    if c.stage < 2 or not cluster.overlap:
        return
    behind = 1 if c.reduce_once else c.accumulation
    backward = parts["backward"] + parts["masked backward"] * (c.stage == 3)
    room = cluster.overlap * backward * behind / c.accumulation
    if c.stage == 3:
        room += cluster.overlap * (parts["forward"] + parts["second forward"] + parts["masked forward"])
    kinds = ["send gradients"] if c.accumulation == 1 or not c.reduce_once else []
    for name in [*kinds, *(["send parameters"] if c.stage == 3 else [])]:
        hidden = min(room, parts.get(name, 0.0))
        if hidden:
            parts[name] -= hidden
            room -= hidden
