"""Bytes that a rank sends in an optimizer step, by kind: the kinds and the bytes that the log counts (``sent_mb/...``).

Counted as m2_ds.parallel.traffic counts: a ring's bytes. Left out, as in the log or because it is little: objects,
"log", and "control" (norms, overflow flags, shapes and masks between stages).

Legend: N data-parallel ranks, r tensor-parallel ones, g ranks of a contrast group, k micro-batches of b pairs, s =
ceil(b / r) rows of a share, C captions, M matrices of features, E embedding, e bytes a number.
"""

from collections.abc import Callable
from dataclasses import dataclass

from m2_ds.config import RunConfig
from m2_ds.model.stack import Part
from m2_ds.plan.joint import Joint, joint_of
from m2_ds.plan.layout import Candidate, Load, model_of
from m2_ds.plan.tensor_traffic import joint_bytes, part_bytes
from m2_ds.plan.weights import group_sizes, weights_of
from m2_ds.plan.work import BYTES, Tokens, tokens_of

Add = Callable[[str, float, float], None]  # takes a kind, bytes and messages
ALIGNMENT = 2  # numbers; DeepSpeed's nccl_start_alignment_factor


@dataclass(frozen=True)
class Traffic:
    """``sent``: bytes by kind; ``messages``: how many collectives they come in."""

    sent: dict[str, float]
    messages: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.sent.values())


def traffic_of(
    config: RunConfig, candidate: Candidate, load: Load, on_cpu: bool, stages: list[Part], stage: int,
    exactly: bool = False,
) -> Traffic:  # fmt: skip
    """Of a rank of pipeline stage ``stage``. ``exactly``: with the padding of ZeRO's groups, which takes a while."""
    part, c, k = stages[stage], candidate, candidate.accumulation
    model, element = model_of(config, c), BYTES[config.engine.precision]
    of = tokens_of(model, load, c.micro_batch, on_cpu, c.tensor if c.sequence else 1)
    joint = joint_of(config, load, c.micro_batch)
    sent: dict[str, float] = {}
    messages: dict[str, float] = {}

    def add(kind: str, size: float, count: float) -> None:
        if size:
            sent[kind] = sent.get(kind, 0.0) + size
            messages[kind] = messages.get(kind, 0.0) + count

    if c.tensor > 1:
        once = part_bytes(model, part, of, c.tensor, config.engine.precision, c.sequence)
        alone = k - c.kept  # forwards that leave no graph
        layers = 2 * (part.end - part.start)
        calls = layers * (4 * k + 2 * alone + (2 * k if model.recompute != "none" else 0))
        add("tensor parallel", once.forward * (k + alone) + once.backward * k, calls)
        add("tensor parallel norms", once.norms_forward * (k + alone) + once.norms_backward * k, calls)
        if joint is not None:  # in the forward that has a backward
            added = joint_bytes(model, part, joint, c.tensor, config.engine.precision)
            calls = layers * k * (4 + 2 * (model.recompute != "none"))
            add("tensor parallel", k * (added.forward + added.backward), calls + 2 * k * part.is_last)
            add("tensor parallel norms", k * (added.norms_forward + added.norms_backward), calls)
    if part.is_last:
        _add_loss(add, config, c, load)
    _add_state(add, config, c, part, element, exactly)
    row = model.hidden_size * element
    if c.pipeline > 1 and stage < c.pipeline - 1:  # forward in both passes, joint sequences in the second
        rows = _rows(config, of, stages[stage])
        add("pipeline", k * (2 * rows + _joint_rows(joint)) * row, 2 * k)
    if c.pipeline > 1 and stage > 0:  # gradients back in the second
        add("pipeline", k * (_rows(config, of, stages[stage - 1]) + _joint_rows(joint)) * row, k)
    if joint is not None and c.data > 1:  # how many words and patches are hidden
        add("masked", 2 * (c.data - 1) / c.data * 16, 1)
    if c.tensor * c.pipeline > 1:
        first = stage == 0
        numbers = 8 * k * (2 * load.captions * c.micro_batch * load.length + (load.captions + 2) * c.micro_batch)
        over_tensor = (c.tensor - 1) / c.tensor
        pictures = k * c.micro_batch * 3 * model.image_size**2
        at_end = c.pipeline > 1 and config.loss.cmim.weight > 0  # which are told there
        size = numbers * (c.pipeline - 1) / c.pipeline
        if first:
            size += numbers * over_tensor + pictures * (over_tensor + at_end)
        add("batches", size, 2 + k * (1 + at_end * first))
    return Traffic(sent, messages)


def _rows(config: RunConfig, of: list[Tokens], part: Part) -> int:
    """Rows of what a stage hands on: tokens, padding included, and behind the backbone its class tokens."""
    rows = sum(tokens.padded for tokens in of)
    behind = part.end >= config.model.num_layers and config.loss.unimodal_weight > 0
    return rows + (sum(tokens.samples for tokens in of) if behind else 0)


def _joint_rows(joint: Joint | None) -> int:
    return 0 if joint is None else joint.of.tokens


def _add_loss(add: Add, config: RunConfig, c: Candidate, load: Load) -> None:
    """Ids, features, log-sum-exps; and, where tensor-parallel ranks share the loss, what each has found."""
    levels = sum(w > 0 for w in (config.loss.unimodal_weight, config.loss.vl_weight))
    matrices, problems = levels * (1 + load.captions), levels * load.captions
    others = c.group * c.tensor - 1
    rows = c.accumulation * -(-c.micro_batch // c.tensor)
    exchanged = 2 if config.loss.exchange == "bf16" else 4
    add("ids", others * rows * 8, 1)
    add("features", others * rows * matrices * config.model.embed_dim * exchanged, c.accumulation)
    if config.loss.form == "softmax":
        add("log-sum-exp", others * rows * 2 * problems * 4, 1)
    if c.tensor > 1:
        gathered = (c.tensor - 1) * rows * 4 * (matrices * config.model.embed_dim + problems)
        once = levels * (1 + config.model.logit_bias) + 3
        add("shares of the loss", gathered + 2 * (c.tensor - 1) / c.tensor * once * 4, 3)


def _add_state(add: Add, config: RunConfig, c: Candidate, part: Part, element: int, exactly: bool) -> None:
    """Gradients over data-parallel ranks, and weights after the update (ZeRO 1, 2) or around every use (3)."""
    if c.data == 1:
        return
    numbers = weights_of(config, part, c.tensor)
    ring = (c.data - 1) / c.data
    partly = c.stage >= 2 and not c.reduce_once
    times = c.accumulation if partly else 1
    buckets = max(1.0, numbers.trained / 5e7)
    if c.stage < 3:
        # DeepSpeed's ZeRO 1 and 2 sum every bucket whole and keep their part of it.
        add("gradients", times * 2 * ring * numbers.trained * element, times * buckets)
        if c.stage:
            groups = group_sizes(config, part, c.tensor) if exactly else [numbers.trained]
            multiple = ALIGNMENT * c.data
            add("parameters", ring * sum(n + -n % multiple for n in groups) * element, len(groups))
        return
    add("gradients", times * ring * numbers.trained * element, times * buckets)
    forwards = c.accumulation + (c.accumulation - c.kept)
    backwards = c.accumulation
    joint = c.accumulation if config.loss.masked else 0  # use every layer once more, behind pictures and captions
    uses = forwards + backwards + 2 * joint if numbers.all > 1e9 else forwards
    add("parameters", uses * ring * numbers.all * element, uses * max(1, numbers.tensors // 4))
