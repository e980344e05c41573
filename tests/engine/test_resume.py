"""A run that was interrupted ends as one that was not: weights, optimizer, schedule, data position, log, to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest

from m2_ds.parallel.mesh import Mesh
from tests.engine.jobs import changed, compare_checkpoints, exact_part, interrupt_and_go_on, log_lines, train_all
from tests.support.ranks import run_ranks

# ZeRO-3 last: it puts a linear layer of its own (another order of sums) into torch, for good.
CASES = ["zero0", "zero1", "zero2", "zero0-bf16", "zero1-bf16", "zero2_offload-bf16", "zero0-muon", "zero0-muon-bf16"]
CASES += ["zero3", "zero3-bf16", "zero3_offload-bf16"]


def job(mesh: Mesh, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Any]:
    return [(train_all(mesh, [straight]), interrupt_and_go_on(mesh, [stopped], steps=6)) for straight, stopped in pairs]


@pytest.fixture(scope="module")
def folders(
    recipe: dict[str, Any],
    broken_shapes: Path,
    deepspeed_files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """NAME/straight and NAME/stopped: a checkpoint after step 4, an end after step 6, log lines every 3 steps."""
    folder = tmp_path_factory.mktemp("resume")
    pairs = []
    for name in CASES:
        tree = changed(
            recipe,
            {
                "engine.deepspeed": str(deepspeed_files[name.split("-")[0]]),
                "optim.kind": "muon" if "-muon" in name else "adamw",
                "engine.precision": "bf16" if name.endswith("-bf16") else "fp32",
                "data.sources": [{"path": str(broken_shapes)}],
                "checkpoint.every": 4,
                "log.every": 3,
            },
        )
        pairs.append([changed(tree, {"folder": str(folder / name / kind)}) for kind in ("straight", "stopped")])
    for results in run_ranks(2, job, pairs, seconds=250):
        for straight, [[first, second]] in results:
            assert straight == [None] and "Interrupted" in first and second is None, results
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(folders: Path, name: str) -> None:
    straight, stopped = folders / name / "straight", folders / name / "stopped"
    compare_checkpoints(stopped / "checkpoints/step-00000008", straight / "checkpoints/step-00000008")
    lines = exact_part(log_lines(stopped))
    assert lines == exact_part(log_lines(straight))
    # Lines are cut at checkpoints, and those past the checkpoint of the first part were dropped.
    assert [line["step"] for line in lines] == [3, 4, 6, 8]
    assert lines[0]["skipped"] and sum(lines[-1]["skipped"].values()) > sum(lines[0]["skipped"].values())


@pytest.mark.distributed
def test_a_checkpoint_says_where_the_run_stands(folders: Path) -> None:
    state = json.loads((folders / "zero2/stopped/checkpoints/step-00000004/state.json").read_text())
    assert state["step"] == 4 and state["samples"] == 64
    assert state["updates"] == 4
    sizes = {"tensor_parallel": 1, "data_parallel": 2, "pipeline_parallel": 1}
    assert state["layout"] == {**sizes, "zero_stage": 2, "contrast_groups": 1}
