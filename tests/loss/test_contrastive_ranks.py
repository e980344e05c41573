"""The loss over contrast groups of real ranks, against one process with all pairs of the group."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from m2_ds.loss import answers, tiles
from m2_ds.loss.config import LossConfig
from m2_ds.loss.contrastive import contrastive_loss
from m2_ds.loss.exchange import Exchange
from m2_ds.parallel.collectives import all_gather_objects
from m2_ds.parallel.config import ContrastGroupConfig
from m2_ds.parallel.mesh import Mesh
from tests.loss.problem import WIDTH, Problem, gradients_of, relative
from tests.support.ranks import run_ranks

RANKS, PAIRS, CAPTIONS = 4, 3, 2  # PAIRS of a micro-batch


@dataclass(frozen=True)
class Case:
    group: int
    micro_batches: int
    options: tuple[tuple[str, object], ...] = ()
    strided: bool = False
    padded: bool = False

    @property
    def config(self) -> LossConfig:
        return LossConfig.model_validate(dict(self.options))

    def members(self, rank: int) -> list[int]:
        count = RANKS // self.group
        if self.strided:
            return list(range(rank % count, RANKS, count))
        return list(range(rank // self.group * self.group, (rank // self.group + 1) * self.group))


OPTIONS = [
    (),
    (("repeats", "exclude"), ("label_smoothing", 0.1)),
    (("repeats", "negative"), ("exchange", "bf16")),
    (("form", "sigmoid"),),
]
CASES = [
    *(Case(g, k, options) for g in (1, 2, 4) for k in (1, 2, 3) for options in OPTIONS),
    *(Case(2, k, options, strided=True) for k in (1, 2) for options in OPTIONS[:2]),
    *(Case(g, 2, options, padded=True) for g in (2, 4) for options in (OPTIONS[0], OPTIONS[1], OPTIONS[3])),
]


def on_rank(mesh: Mesh, cases: list[Case], low_precision: bool) -> list[dict[str, object]]:
    """Fewer pairs than a tile would hold otherwise: tiles cross the borders of micro-batches and ranks."""
    for module in (answers, tiles):
        module.TILE_ROWS, module.TILE_COLUMNS = 4, 5
    return [one(mesh, case, low_precision) for case in cases]


def one(mesh: Mesh, case: Case, low_precision: bool) -> dict[str, object]:
    placement = "strided" if case.strided else "contiguous"
    here = mesh.with_contrast_group(ContrastGroupConfig(size=case.group, placement=placement))
    dtype = torch.float32 if low_precision else torch.float64
    own = case.micro_batches * PAIRS
    problem = Problem.random(hash((case.group, case.micro_batches)), case.group * own, CAPTIONS, dtype)
    if case.padded:
        problem.ids[-2:] = answers.PADDING
    members = case.members(mesh.rank)
    rows = slice(members.index(mesh.rank) * own, (members.index(mesh.rank) + 1) * own)
    features = [x.detach() for x in problem.features()]
    mesh.traffic.take()
    exchange = Exchange(problem.ids[rows], here.contrast, case.micro_batches, case.config.exchange)
    for micro in torch.arange(rows.start, rows.stop).split(PAIRS):
        exchange.send([x[micro] for x in features])
    loss = contrastive_loss(problem.levels(case.config.form), exchange.receive(), case.config)
    sent, _ = mesh.traffic.take()
    if case.config.exchange == "bf16" and case.group > 1 and low_precision:
        with torch.no_grad():
            problem.raw[:] = [x.bfloat16().to(dtype) for x in features]
        wanted = rounded_gradients(problem, case.config)
    else:
        wanted = problem.dense_gradients(case.config)
    found = gradients_of(loss)
    count = len(features)
    # Own shares: rows lie side by side, scales and biases add up over the group.
    errors = [relative(f, w[rows]) for f, w in zip(found[:count], wanted[:count])]
    shares = torch.stack([g.reshape(()) for g in found[count:]]), float(loss.by_pair.sum())
    everyone = [all_gather_objects(shares, mesh.data_parallel)[rank] for rank in members]
    total = torch.stack([scalars for scalars, _ in everyone]).sum(0)
    errors += [relative(t, w.reshape(())) for t, w in zip(total, wanted[count:], strict=True)]
    return {"error": max(errors), "sent": sent, "pairs": loss.pairs, "members": here.contrast.name}


def rounded_gradients(problem: Problem, config: LossConfig) -> list[Tensor]:
    """Of the loss at features that are rounded already and not normalised again."""
    features = [x.detach().requires_grad_() for x in problem.raw]
    return list(torch.autograd.grad(problem.dense(config, features), features + problem.scales))


@pytest.mark.distributed
def test_every_group_and_accumulation_gives_the_gradients_of_its_giant_batch() -> None:
    for rank, results in enumerate(run_ranks(RANKS, on_rank, CASES, False)):
        for case, found in zip(CASES, results, strict=True):
            assert found["error"] < 1e-12, (case, found)
            pairs = case.group * case.micro_batches * PAIRS
            assert found["pairs"] == pairs - (2 if case.padded else 0)
            if case.group > 1:
                assert found["members"].endswith(f"(ranks {', '.join(map(str, case.members(rank)))})")


@pytest.mark.distributed
def test_bytes_sent_are_those_of_the_formula() -> None:
    """2 (g - 1) k b d e of features for each level and pair of sides, 8 (g - 1) k b of log-sum-exps for each loss."""
    cases = [Case(g, k, options) for g in (1, 2, 4) for k in (1, 3) for options in OPTIONS]
    for results in run_ranks(RANKS, on_rank, cases, True):
        for case, found in zip(cases, results, strict=True):
            g, n = case.group, case.micro_batches * PAIRS
            wide = 2 if case.config.exchange == "bf16" else 4
            levels = 2
            wanted = {
                "features": levels * (1 + CAPTIONS) * (g - 1) * n * WIDTH * wide,
                "log-sum-exp": 0 if case.config.form == "sigmoid" else levels * CAPTIONS * 8 * (g - 1) * n,
                "ids": 8 * (g - 1) * n,
            }
            assert found["sent"] == {kind: x for kind, x in wanted.items() if x}, case
            assert found["error"] < 1e-5, (case, found)
