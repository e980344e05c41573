"""The examination as users start it: alone, by the launcher, with a rank that differs, with one that never comes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from m2_ds import launch
from m2_ds.doctor import __main__ as target
from m2_ds.doctor import job
from m2_ds.doctor.command import doctor
from tests.engine.conftest import LAUNCHER_SETS
from tests.engine.jobs import changed

ROOT = Path(__file__).parents[2]
SECONDS = 120.0


@pytest.fixture
def recipe_file(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*LAUNCHER_SETS, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results by name, of the report at a path; every one of a name has to be equal in status."""
    content = json.loads(path.read_text())
    found: dict[str, dict[str, Any]] = {}
    for result in content["results"]:
        assert found.setdefault(result["name"], result)["status"] == result["status"]
    return found


def test_alone(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, out = tmp_path / "page.html", tmp_path / "report.json"
    assert target.main(["--config", str(recipe_file), "--html", str(html), "--json", str(out), "seed=4"]) == 0
    shown = capsys.readouterr().out
    assert "m2 doctor" in shown and "first batch" in shown and "0 red" in shown and html.exists()
    found = read(out)
    assert {"configuration", "versions", "space", "tokenizer", "first batch"} <= found.keys()
    assert not (tmp_path / "runs").exists()


def test_a_wrong_recipe_is_a_red_line_among_the_others(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert target.main(["--config", str(recipe_file), "--json", str(out), "--silent", "steps=ten"]) == 1
    found = read(out)
    assert found["configuration"]["status"] == "fail" and "steps: Input should be" in found["configuration"]["found"]
    assert found["versions"]["status"] == "ok" and "tokenizer" not in found


def test_without_a_recipe_only_the_machine_is_looked_at(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert target.main(["--json", str(out), "--silent"]) == 0
    found = read(out)
    assert found["versions"]["status"] == "ok" and found["configuration"]["status"] == "skipped"
    assert "tokenizer" not in found and "space" not in found


def test_a_rank_that_never_comes_is_named(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(job, "JOIN_S", 1.0)
    report = job.examine(recipe_file)
    assert report is not None and report.failed
    told = {result.name: result for result in report.results}
    assert told["present"].status == "fail" and "rank 1 of 2 did not come within 1 s" in told["present"].found
    assert told["groups"].status == "skipped" and told["layout"].status == "ok"
    # And where the port is taken, its own checks are told all the same.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        report = job.examine(recipe_file)
    assert report is not None
    told = {result.name: result for result in report.results}
    assert "rank 0 cannot open the job's store" in told["present"].found and told["layout"].status == "ok"


@pytest.mark.distributed
def test_the_launcher_starts_ranks_that_look_at_each_other(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    out = tmp_path / "report.json"
    assert doctor(recipe_file, processes=2, json=out, html=tmp_path / "page.html") == 0, capsys.readouterr().out
    shown = " ".join(capsys.readouterr().out.split())  # lines are as wide as the terminal
    assert "2 rank(s) on 1 host(s)" in shown and "Traceback" not in shown
    found = read(out)
    for name in ("present", "software", "recipe and data", "all ranks", "contrast", "arithmetic", "first batch"):
        assert found[name]["status"] in ("ok", "warn"), found[name]
    assert "2 data x 1 pipeline" in found["layout"]["found"] and "ranks 0 to 1" in found["present"]["found"]
    assert not (tmp_path / "runs").exists() and (tmp_path / "page.html").exists()


@pytest.mark.distributed
def test_ranks_of_other_recipes_and_software_are_named(recipe_file: Path, tmp_path: Path) -> None:
    """Two ranks as two hosts: the second has another seed and another version of torch."""
    tree = yaml.safe_load(recipe_file.read_text())
    recipe_file.write_text(yaml.safe_dump(changed(tree, {"parallel.tensor_parallel_size": 2})))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    other = (
        "import sys; from m2_ds.engine import environment; found = environment._version\n"
        "environment._version = lambda name: '2.0' if name == 'torch' else found(name)\n"
        "from m2_ds.doctor.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    out, ranks = tmp_path / "report.json", []
    for rank, (program, extra) in enumerate(((["-m", "m2_ds.doctor"], []), (["-c", other], ["seed=9"]))):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "GROUP_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
        }
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, *program, "--config", str(recipe_file), "--json", str(out), "--silent", *extra]
        environment = {**os.environ, **place, **address}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [rank.communicate(timeout=SECONDS)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 0], errors
    found = read(out)
    assert found["recipe and data"]["status"] == "fail" and "recipe: " in found["recipe and data"]["found"]
    assert "torch: 2.0 on rank 1" in found["software"]["found"] and found["software"]["status"] == "fail"
    for name in (
        "present",
        "connections",
        "clocks",
        "one run folder",
        "all ranks",
        "tensor-parallel",
        "links between hosts",
    ):
        assert found[name]["status"] in ("ok", "warn"), found[name]


def test_a_launcher_that_leaves_no_report_is_told_with_its_last_words(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "doctor", lambda *_: (9, "line\n" * 99 + "ImportError: libmpi"))
    assert doctor(recipe_file, processes=2) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "ended with code 9 and no report" in shown and "ImportError: libmpi" in shown and "first batch" in shown


def test_options_that_do_not_go_together(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--processes is for this machine"):
        doctor(recipe_file, processes=2, hostfile=tmp_path / "hosts")
    with pytest.raises(ValueError, match="there is no file"):
        doctor(recipe_file, hostfile=tmp_path / "hosts")
    with pytest.raises(ValueError, match="at least 1"):
        doctor(recipe_file, processes=0)


def test_a_hostfile_is_handed_to_the_launcher(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts, started = tmp_path / "hosts", []
    hosts.write_text("a slots=8\n")
    monkeypatch.setattr(launch, "_start", lambda command: started.append(command) or 1)
    assert doctor(recipe_file, ("seed=4",), hostfile=hosts, html=tmp_path / "page.html") == 1
    wanted = ["--hostfile", str(hosts), "--module", "m2_ds.doctor", "--html", str(tmp_path / "page.html")]
    assert started[0][3:] == [*wanted, "--config", str(recipe_file), "seed=4"]
