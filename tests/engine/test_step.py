"""The two-pass step under real engines: gradients and clip norm of every data-parallel layout against giant batches."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.engine.cases import PAIRS, Case, check, run_cases
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(400)
STAGES = ("zero0", "zero1", "zero2", "zero3")


def every_layout(ranks: int) -> list[Case]:
    groups = [g for g in (1, 2, 4) if ranks % g == 0]
    return [Case(stage, g, k) for stage, g, k in itertools.product(STAGES, groups, (1, 2, 4))]


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
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
