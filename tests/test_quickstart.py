"""The README's first command on generated data, small: trains, evaluates, writes the page, reuses what is there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_quickstart_on_scenes_and_again(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "ds_configs", tmp_path / "ds_configs")
    command = [sys.executable, "-m", "m2_ds.cli", "quickstart", "--data", "scenes", "--minutes", "1.2", "--ranks", "2"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, env=dict(os.environ))
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "runs/scenes-1.2min-seed0"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "hard" in page.lower() and len(page) > 20_000
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, env=dict(os.environ))
    assert again.returncode == 0 and "is trained" in again.stdout


def test_needs_a_checkout(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "m2_ds.cli", "quickstart"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "top of a checkout" in done.stderr
