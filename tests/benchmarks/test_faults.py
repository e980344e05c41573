"""A few faults of the campaign: the run ends with the weights of the run that was left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("kill", "kill in a checkpoint", "truncated file", "stop", "terminate")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_run_with_faults_ends_as_one_without(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    command = [sys.executable, "benchmarks/faults.py", "--faults", "5", "--out", str(out), "--kinds", *KINDS]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=850)
    assert done.returncode == 0, done.stdout
    (episode,) = json.loads(out.read_text())["episodes"]
    assert episode["difference"] == "" and episode["killed_by_launcher"] == 0, done.stdout
    assert 3 <= len(episode["faults"]) <= 6 and episode["starts"] > 2, done.stdout  # shares of five are rounded
    assert {fault["kind"] for fault in episode["faults"]} <= set(KINDS)
    assert "bit for bit" in out.with_suffix(".md").read_text()
