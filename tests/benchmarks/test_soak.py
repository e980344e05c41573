"""What the soak counts as flat; and, slowly, that a run of many checkpoints and evaluations is."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import soak


def looks(memory: list[float], files: list[int]) -> list[soak.Look]:
    steps = [300, 350, 900, 950]
    return [soak.Look(step, "rank 0", mb, n, 5) for step, mb, n in zip(steps, memory, files)]


OPTIONS = soak.Options(steps=1000, growth_mb=20.0)


@pytest.mark.parametrize(
    ("memory", "files", "flat"),
    [
        ([300, 300, 310, 310], [40, 41, 41, 40], True),
        ([300, 300, 330, 330], [40, 40, 40, 40], False),
        ([300, 300, 300, 300], [40, 40, 41, 41], False),
    ],
)
def test_growth_is_told_from_a_checkpoint_under_way(memory: list[float], files: list[int], flat: bool) -> None:
    assert soak.verdict(looks(memory, files), OPTIONS)["rank 0"]["flat"] is flat


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_a_run_of_many_checkpoints_and_evaluations_is_flat(tmp_path: Path) -> None:
    options = soak.Options(steps=1800, every_s=1.0, folder=tmp_path)
    found = soak.verdict(soak.soak(options), options)
    assert {"rank 0", "rank 1"} <= set(found)
    assert all(row["flat"] for row in found.values()), found
