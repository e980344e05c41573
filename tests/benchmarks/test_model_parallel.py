"""Tensor-parallel traffic is what the benchmark's formula says, to the byte; kinds of memory are counted once."""

import dataclasses
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import model_parallel as bench
import model_parallel_rank as rank_work
from model_parallel_rank import Count, Counted, Layout

from m2_ds.model.config import PRESETS, M2EncoderConfig
from m2_ds.parallel.mesh import Mesh
from tests.support.ranks import run_ranks

MODEL = {**PRESETS["test"], "num_vl_layers": 2}
PADDED, WHOLE = (5, 9), (8, 9)


def counts(mesh: Mesh, jobs: list[Count]) -> list[Counted]:
    here = {sequence: mesh.with_layout(Layout(2, sequence=sequence).config()) for sequence in (False, True)}
    return [rank_work.count(here[job.layout.sequence], job) for job in jobs]


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_what_is_sent_is_what_the_formula_says() -> None:
    jobs = [
        Count(Layout(2, sequence=sequence), {**MODEL, "recompute": recompute}, precision, 3, lengths)
        for sequence, recompute, precision, lengths in itertools.product(
            (False, True), ("none", "full"), bench.BYTES, (PADDED, WHOLE)
        )
    ]
    for by_job in run_ranks(2, counts, jobs):
        for job, counted in zip(jobs, by_job):
            config, sequence = M2EncoderConfig.model_validate(job.model), job.layout.sequence
            rows = bench.rows_of(config, counted.lengths, 2 if sequence else 1)
            wanted = bench.model_bytes(config, rows, 2, job.precision, sequence)
            assert bench.found_bytes(counted) == wanted, job
            assert min(dataclasses.astuple(wanted)) > 0


def test_the_sub_layer_norms_are_under_a_percent_of_what_the_presets_send() -> None:
    assert all(float(cell[:-1]) < 1 for row in bench._shares() for cell in row[2:] if cell != "-")


def test_a_storage_is_counted_once_by_the_first_kind_that_holds_it() -> None:
    model = nn.Linear(8, 4, bias=False)
    model.weight.grad = torch.zeros(4, 8)
    master = nn.Parameter(torch.zeros(32))
    inner = torch.optim.AdamW([master])
    inner.state[master] = {"exp_avg": torch.zeros(32), "exp_avg_sq": torch.zeros(32)}
    wrapper: Any = SimpleNamespace(
        optimizer=inner,
        flat=model.weight.detach().view(-1),
        averaged_gradients={0: [model.weight.grad, torch.zeros(2)]},
    )
    found = rank_work.census_of(SimpleNamespace(optimizer=wrapper), model)
    assert found == {"weights": 128, "gradients": 136, "optimizer": 3 * 128}
