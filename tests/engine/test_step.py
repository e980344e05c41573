"""The two-pass step under real engines: gradients and clip norm of every layout against giant batches in one process.

The reference is written from the definitions: one dense loss a group by autograd, in fp64, averaged over groups.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from m2_ds.config import RunConfig
from m2_ds.data.stream import PairBatch
from m2_ds.engine.setup import build_engine, deepspeed_config
from m2_ds.engine.step import ContrastiveStep, StepResult
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.random import Noise
from m2_ds.model.weights import freeze_unused, init_weights
from m2_ds.parallel.config import ContrastGroupConfig
from m2_ds.parallel.mesh import Mesh
from tests.engine.jobs import changed, config_of
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(400)
PAIRS = 3  # of a micro-batch
STAGES = ("zero0", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Case:
    """One layout; ``strided`` groups; ``partial``: pairs of the last rank's last micro-batch."""

    stage: str
    group: int
    micro_batches: int
    kept: int = 1
    reduce_once: bool = True
    strided: bool = False
    partial: int = PAIRS
    changes: tuple[tuple[str, Any], ...] = ()

    def config(self, tree: dict[str, Any], files: dict[str, Path], ranks: int) -> RunConfig:
        settings = {
            "global_batch": ranks * self.micro_batches * PAIRS,
            "micro_batch": PAIRS,
            "engine.deepspeed": str(files[self.stage]),
            "engine.kept_graphs": self.kept,
            "engine.reduce_once": self.reduce_once,
            "model.drop_path": 0.3,
            "model.patch_drop": 0.25,
            "optim.rules": [],
            "optim.grad_clip": 0.5,
            "evaluation": {"tasks": []},
        }
        return config_of(changed(tree, {**settings, **dict(self.changes)}))

    def groups(self, ranks: int) -> list[list[int]]:
        count = ranks // self.group
        if self.strided:
            return [list(range(first, ranks, count)) for first in range(count)]
        return [list(range(first, first + self.group)) for first in range(0, ranks, self.group)]


def pairs_of(case: Case, config: RunConfig, rank: int, ranks: int) -> list[PairBatch]:
    """Random micro-batches, other ones for every case; some pairs of some groups repeat."""
    g = torch.Generator().manual_seed(hash((case.group, case.micro_batches, case.partial, ranks)) % 2**31)
    model, batches = config.model, []
    for micro, of in itertools.product(range(case.micro_batches), range(ranks)):
        length = int(torch.randint(4, 9, (), generator=g))
        mask = torch.arange(length) < torch.randint(2, length + 1, (2, PAIRS, 1), generator=g)
        batch = PairBatch(
            images=torch.randint(0, 256, (PAIRS, 3, model.image_size, model.image_size), generator=g).to(torch.uint8),
            ids=torch.randint(0, model.vocab_size, (2, PAIRS, length), generator=g),
            mask=mask.long(),
            language=torch.randint(0, 2, (2, PAIRS), generator=g),
            group=torch.randint(0, 2 * ranks * case.micro_batches, (PAIRS,), generator=g),
            slot=torch.randint(0, 10**9, (PAIRS,), generator=g),
            keys=[],
            skipped={},
        )
        last = micro == case.micro_batches - 1 and of == ranks - 1
        if of == rank:
            batches.append(cut(batch, case.partial) if last else batch)
    return batches


def cut(batch: PairBatch, pairs: int) -> PairBatch:
    fields = {n: getattr(batch, n)[:pairs] for n in ("images", "group", "slot")}
    return PairBatch(
        **fields, **{n: getattr(batch, n)[:, :pairs] for n in ("ids", "mask", "language")}, keys=[], skipped={}
    )


def fresh_model(config: RunConfig) -> M2Encoder:
    model = M2Encoder(config.model)
    init_weights(model, config.model, config.seed)
    freeze_unused(model)
    with torch.no_grad():  # far from where gradients are small
        model.logit_scale.fill_(1.7)
        model.logit_vl_scale.fill_(3.1)
    return model


def reference(case: Case, config: RunConfig, ranks: int) -> tuple[dict[str, Tensor], float]:
    """Gradients by name and the mean over groups of the groups' losses."""
    model = fresh_model(config).double()
    everything = [pairs_of(case, config, rank, ranks) for rank in range(ranks)]
    losses = []
    for members in case.groups(ranks):
        batches = [batch for rank in members for batch in everything[rank] if len(batch.slot)]
        losses.append(group_loss(model, config, batches))
    loss = torch.stack(losses).mean()
    loss.backward()
    return {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}, loss.item()


def group_loss(model: M2Encoder, config: RunConfig, batches: list[PairBatch]) -> Tensor:
    levels: dict[str, tuple[list[Tensor], list[Tensor]]] = {"unimodal": ([], []), "vl": ([], [])}
    for batch in batches:
        image = model.image_features(batch.images, Noise.of(config.seed, batch.slot))
        text = [
            model.text_features(ids, mask, Noise.of(config.seed, batch.slot, view=1 + c))
            for c, (ids, mask) in enumerate(zip(batch.ids, batch.mask))
        ]
        for level, (images, texts) in levels.items():
            images.append(getattr(image, level))
            texts.append(torch.stack([getattr(t, level) for t in text]))
    group = torch.cat([batch.group for batch in batches])
    same, eye = group[:, None] == group, torch.eye(len(group), dtype=torch.bool)
    repeats, form, smooth = config.loss.repeats, config.loss.form, config.loss.label_smoothing
    right = (same if repeats == "positive" else eye).double()
    counts = ~(same & ~eye) if repeats == "exclude" else torch.ones_like(same)
    loss = torch.zeros((), dtype=torch.float64)
    for level, (images, texts) in levels.items():
        weight = config.loss.unimodal_weight if level == "unimodal" else config.loss.vl_weight
        prefix = "logit" if level == "unimodal" else "logit_vl"
        scale = getattr(model, f"{prefix}_scale").exp()
        for text in torch.cat(texts, 1):
            logits = scale * torch.cat(images) @ text.T
            if form == "sigmoid":
                logits = logits + getattr(model, f"{prefix}_bias")
                places = F.binary_cross_entropy_with_logits(logits, right, reduction="none")
                loss = loss + weight * (places * counts).sum() / len(group) / 2
                continue
            target = (1 - smooth) * right / right.sum(1, keepdim=True) + smooth * counts / counts.sum(1, keepdim=True)
            for side in (logits, logits.T):
                log_p = side.masked_fill(~counts, -torch.inf).log_softmax(1).masked_fill(~counts, 0)
                loss = loss - weight * (target * log_p).sum(1).mean() / 2 / 2
    return loss


@dataclass
class Report:
    case: Case
    error: float
    worst: str
    norm: float
    wanted_norm: float
    loss: float
    wanted_loss: float
    pairs: int


def run_cases(mesh: Mesh, tree: dict[str, Any], files: dict[str, Path], cases: list[Case]) -> list[Report]:
    ranks = mesh.world_size
    # References first: ZeRO-3 replaces torch's linear layer for good.
    wanted = [reference(case, case.config(tree, files, ranks), ranks) for case in cases]
    reports = []
    for case, (gradients, loss) in sorted(zip(cases, wanted), key=lambda pair: pair[0].stage):
        placement = "strided" if case.strided else "contiguous"
        here = mesh.with_contrast_group(ContrastGroupConfig(size=case.group, placement=placement))
        config = case.config(tree, files, ranks)
        result, found = one_step(here, config, pairs_of(case, config, mesh.rank, ranks))
        # What no rank reaches (a token that is not there) has a zero gradient or none.
        errors = {n: relative(found.get(n), g) for n, g in gradients.items()}
        worst = max(errors, key=lambda n: errors[n])
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        total = torch.cat([result.loss.sum(1), result.count.sum()[None]])
        total = torch.stack(gathered(mesh, total)).sum(0)
        weights = torch.tensor([config.loss.unimodal_weight, config.loss.vl_weight])
        mean = float((weights * total[:2]).sum() / total[2])
        assert result.grad_norm is not None
        reports.append(
            Report(case, errors[worst], worst, float(result.grad_norm), norm, mean, loss, result.contrastive_batch)
        )
    return reports


def gathered(mesh: Mesh, x: Tensor) -> list[Tensor]:
    from m2_ds.parallel.collectives import all_gather_objects

    return all_gather_objects(x, mesh.data_parallel)


def relative(found: Tensor | None, wanted: Tensor) -> float:
    if found is None:
        return math.inf if wanted.abs().max() > 0 else 0.0
    error = float((found.reshape(wanted.shape) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-4))
    return error if math.isfinite(error) else math.inf


def one_step(mesh: Mesh, config: RunConfig, batches: list[PairBatch]) -> tuple[StepResult, dict[str, Tensor]]:
    """The result, and the full gradient of every parameter as the engine holds it right before its update."""
    from deepspeed.utils import safe_get_full_grad

    engine = build_engine(fresh_model(config), config, deepspeed_config(config, mesh), mesh)
    found: dict[str, Tensor] = {}
    step = engine.step

    def spied() -> None:
        if not engine.is_gradient_accumulation_boundary():
            return step()
        for name, parameter in engine.module.named_parameters():
            gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
            gradient = parameter.grad if gradient is None else gradient
            if gradient is not None:
                found[name] = gradient.detach().float().clone()
        return step()

    engine.step = spied
    engine.train()
    result = ContrastiveStep(engine, config, mesh, languages=2)(batches)
    engine.destroy()
    return result, found


def check(reports: list[Report]) -> None:
    for report in reports:
        assert report.error < 1e-5, report
        assert report.norm == pytest.approx(report.wanted_norm, rel=1e-5), report
        assert report.wanted_norm > 0.5, f"clipping was not active: {report}"
        if report.case.partial == PAIRS:
            assert report.loss == pytest.approx(report.wanted_loss, rel=1e-5), report
            assert report.pairs == report.case.group * report.case.micro_batches * PAIRS


def every_layout(ranks: int) -> list[Case]:
    groups = [g for g in (1, 2, 4) if ranks % g == 0]
    return [Case(stage, g, k) for stage, g, k in itertools.product(STAGES, groups, (1, 2, 4))]


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_are_those_of_one_giant_batch_a_group(
    recipe: dict[str, Any], deepspeed_files: dict[str, Path], ranks: int
) -> None:
    cases = every_layout(ranks)
    for reports in run_ranks(ranks, run_cases, recipe, deepspeed_files, cases, seconds=300):
        assert len(reports) == len(cases)
        check(reports)


@pytest.mark.distributed
def test_options_of_the_step_change_no_number(recipe: dict[str, Any], deepspeed_files: dict[str, Path]) -> None:
    cases = [
        *(Case(stage, 1, 3, kept=3) for stage in STAGES),
        *(Case(stage, 1, 3, kept=2, reduce_once=False) for stage in STAGES[:3]),
        Case("zero3", 1, 3, reduce_once=False),
        *(Case(stage, 2, 2, strided=True) for stage in ("zero1", "zero3")),
        *(Case(stage, 2, 2) for stage in ("zero2_offload", "zero3_offload")),
        Case("zero1", 2, 2, changes=(("model.recompute", "full"),)),
        Case("zero1", 2, 2, changes=(("loss.repeats", "exclude"), ("loss.label_smoothing", 0.1))),
        Case("zero1", 2, 2, changes=(("loss.repeats", "negative"), ("loss.label_smoothing", 0.2))),
        Case("zero2", 2, 2, changes=(("loss.form", "sigmoid"), ("model.logit_bias", True))),
    ]
    for reports in run_ranks(2, run_cases, recipe, deepspeed_files, cases, seconds=200):
        check(reports)


@pytest.mark.distributed
@pytest.mark.parametrize("partial", [2, 1, 0])
def test_uneven_batches_are_filled_up_and_do_not_count(
    recipe: dict[str, Any], deepspeed_files: dict[str, Path], partial: int
) -> None:
    exclude = (("loss.repeats", "exclude"), ("loss.label_smoothing", 0.1))
    cases = [
        Case("zero1", 2, 2, partial=partial),
        Case("zero3", 2, 1, partial=partial),
        Case("zero1", 2, 1, partial=partial, changes=exclude),
        Case("zero1", 2, 2, partial=partial, changes=(("loss.form", "sigmoid"), ("model.logit_bias", True))),
        Case("zero1", 1, 2, partial=partial, changes=exclude),
        Case("zero1", 1, 2, partial=partial, changes=(("loss.form", "sigmoid"), ("model.logit_bias", True))),
    ]
    for reports in run_ranks(2, run_cases, recipe, deepspeed_files, cases):
        check(reports)
        for report in reports:
            whole = report.case.group * report.case.micro_batches * PAIRS
            assert report.pairs in (whole, whole - (PAIRS - partial))
