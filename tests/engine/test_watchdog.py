"""A rank that is killed, stopped or hangs ends the job soon, with one paragraph and exit code 76; real processes."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from m2_ds.convert.run_folder import checkpoint_steps
from m2_ds.engine.interrupt import EXIT_CODE
from m2_ds.engine.suspects import LOST
from m2_ds.engine.watchdog import ENDED_FILE
from tests.engine.jobs import changed
from tests.engine.test_launch import start

STUCK = r"rank {rank} \(host \S+, process \d+; step 3: step; after .*\) has made no progress"
SILENT = r"rank {rank} \(host \S+, process \d+; step \d: .*\) has given no sign of life for \d+ s: its process {why}"
UNANSWERED = r"rank 0 \(host \S+, process \d+; step \d: .*\) has not answered for \d+ s.*\(state T\)"
GONE = r"rank {rank} \(host \S+, process \d+; step \d: .*\) is gone: a process that ended without a word was killed"


@pytest.fixture(scope="module")
def tree(recipe: dict[str, Any]) -> dict[str, Any]:
    limits = {"engine.hang_seconds": 12, "engine.silence_seconds": 6}
    return changed(recipe, {"steps": 6, "checkpoint": {"every": 2, "keep": 9}, **limits})


def ended(tree: dict[str, Any], tmp_path: Path, name: str, fault: str, rank: int) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output, and what who started the job is told; it takes seconds from the fault."""
    note = tmp_path / "ended.json"
    folder = tmp_path / "run"
    code, output = start(
        name, "tests.engine.faulty", tree, folder, M2_FAULT=fault, M2_RANK=str(rank), **{ENDED_FILE: str(note)}
    )
    assert time.time() - (folder / "log.jsonl").stat().st_mtime < 60, "it took too long to notice, or to end"
    assert sorted(checkpoint_steps(folder / "checkpoints")) == [2]
    assert output.count("the same command goes on from the newest checkpoint") == 1
    assert name == "torchrun" or "Traceback" not in output  # torchrun shows its own
    return code, output, json.loads(note.read_text())


@pytest.mark.distributed
def test_a_killed_rank_is_told_and_the_others_end_at_once(tree: dict[str, Any], tmp_path: Path) -> None:
    code, output, note = ended(tree, tmp_path, "deepspeed", "SIGKILL", 1)
    assert code in (LOST, 256 - 9)  # as the launcher finds this or that rank first; m2 train gives 76
    assert re.search(GONE.format(rank=1), output), output
    assert note["code"] == LOST and re.match(GONE.format(rank=1), note["reason"])
    assert not (tmp_path / "run/stacks").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "fault", "rank", "words", "codes"),
    [
        ("deepspeed", "hang", 1, STUCK, (LOST,)),
        ("torchrun", "hang", 0, STUCK, (1,)),  # what torchrun makes of any code
        ("deepspeed", "SIGSTOP", 1, SILENT, (LOST, 256 - 9)),
        ("deepspeed", "SIGSTOP", 0, UNANSWERED, (LOST, 256 - 9)),
        ("deepspeed", "hold", 1, SILENT, (LOST, 256 - 9)),
        ("torchrun", "hold", 0, SILENT, (1,)),
        ("torchrun", "SIGKILL", 0, GONE, (1,)),
    ],
)  # fmt: skip
def test_a_rank_that_does_not_go_on_is_told_with_its_stack(
    tree: dict[str, Any], tmp_path: Path, name: str, fault: str, rank: int, words: str, codes: tuple[int, ...]
) -> None:
    code, output, note = ended(tree, tmp_path, name, fault, rank)
    assert code in codes
    why = "is stopped" if fault == "SIGSTOP" else "exists and does not get to answer"
    assert re.search(words.format(rank=rank, why=why), output), output
    assert note["code"] == LOST
    if fault in ("hang", "hold"):
        (stack,) = (tmp_path / "run/stacks").glob(f"rank-{rank:05}-*.txt")
        assert "failing_step" in stack.read_text() and str(stack) in output


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_read_the_verdict_is_ended_by_its_neighbour(
    tree: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    note, began = tmp_path / "ended.json", time.monotonic()
    changes = {"M2_FAULT": "value", "M2_ANOTHER": "hold", "M2_RANK": str(rank), ENDED_FILE: str(note)}
    start("torchrun", "tests.engine.faulty", changed(tree, {"engine.silence_seconds": 60}), tmp_path / "run", **changes)
    assert json.loads(note.read_text())["code"] == 2 and "no usable pair" in json.loads(note.read_text())["reason"]
    assert time.monotonic() - began < 55  # in which the silence is not noticed


@pytest.mark.slow
@pytest.mark.distributed
def test_told_to_end_before_the_first_step(tree: dict[str, Any], tmp_path: Path) -> None:
    note = tmp_path / "ended.json"
    changes = {"M2_FAULT": "told at the start", ENDED_FILE: str(note)}
    _, output = start("deepspeed", "tests.engine.faulty", tree, tmp_path / "run", **changes)
    found = json.loads(note.read_text())
    assert found["code"] == EXIT_CODE and "told to end by SIGTERM before its first step" in found["reason"]
    assert found["reason"] in output and "Traceback" not in output
