"""Jobs on nodes that are network namespaces: the batch script, the pods' script and the doctor, with real ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from m2_ds.cluster.command import kubernetes, slurm
from m2_ds.config import load_config
from m2_ds.convert.run_folder import checkpoint_steps
from m2_ds.doctor.sizes import checkpoint_bytes, numbers
from tests.cluster.slurm import sbatch
from tests.engine.conftest import deepspeed_files, recipe, shapes, tokenizer_folder
from tests.engine.jobs import changed, log_lines

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import network

__all__ = ["deepspeed_files", "recipe", "shapes", "tokenizer_folder"]
ROOT = Path(__file__).parents[2]
SECONDS = 400.0
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture
def four_nodes() -> Iterator[list[network.Node]]:
    try:
        with network.nodes(4, None, bridge="m2test", subnet="10.78.0") as nodes:
            yield nodes
    except ValueError as error:
        pytest.skip(f"nodes cannot be made here: {error}")


@pytest.fixture
def recipe_file(recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    settings = {"folder": str(tmp_path / "run"), "steps": 2, "optim.schedule.warmup_steps": 1}
    path.write_text(yaml.safe_dump(changed(recipe, settings)))
    return path


def test_a_batch_script_trains_on_two_nodes(
    four_nodes: list[network.Node], recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script, nodes = tmp_path / "job.sh", four_nodes[:2]
    slurm(
        recipe_file, nodes=2, gpus_per_node=0, ranks_per_node=1, interface="eth0", python=sys.executable, folder=ROOT,
        out=script,
    )  # fmt: skip
    addresses, namespaces = [node.address for node in nodes], [node.namespace for node in nodes]
    outcome = sbatch(script, tmp_path, addresses, namespaces=namespaces, seconds=SECONDS)
    assert outcome.codes == [0], outcome.output
    assert "2 rank(s) on 2 host(s)" in " ".join(outcome.output.split()) and "0 red" in outcome.output
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2]
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["world_size"] == 2
    assert min(node.sent_bytes() for node in nodes) > 1e6  # gradients went over the links
    # The room that the doctor says a checkpoint takes is what its tensors take.
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert sum(map(tensor_bytes, checkpoint.rglob("*.safetensors"))) == checkpoint_bytes(
        numbers(load_config(recipe_file))
    )


def tensor_bytes(path: Path) -> int:
    """Of a safetensors file, without its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def test_a_job_that_is_told_to_end_goes_on_when_it_is_requeued(
    four_nodes: list[network.Node], recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script, nodes, steps = tmp_path / "job.sh", four_nodes[:2], 60
    slurm(
        recipe_file, ("checkpoint.every=1", f"steps={steps}"), nodes=2, gpus_per_node=0, ranks_per_node=1,
        interface="eth0", python=sys.executable, folder=ROOT, doctor=False, out=script,
    )  # fmt: skip

    def well_on(start: int) -> bool:
        return start == 0 and max(checkpoint_steps(tmp_path / "run/checkpoints"), default=0) >= 3

    addresses, namespaces = [node.address for node in nodes], [node.namespace for node in nodes]
    outcome = sbatch(script, tmp_path, addresses, namespaces=namespaces, signal_when=well_on, seconds=SECONDS)
    # A trainer that knows the signal ends with 75, one that does not is ended by it: either goes on.
    assert len(outcome.codes) == 2 and outcome.codes[0] in (75, 138) and outcome.codes[1] == 0, outcome.output
    assert "going on after step" in outcome.output
    assert [line["step"] for line in log_lines(tmp_path / "run")] == list(range(1, steps + 1))


def test_two_pods_train(four_nodes: list[network.Node], recipe_file: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "job.yaml"
    kubernetes(
        recipe_file, image="none", nodes=2, gpus_per_node=0, ranks_per_node=1, interface="eth0", python=sys.executable,
        out=manifest,
    )  # fmt: skip
    objects = {document["kind"]: document for document in yaml.safe_load_all(manifest.read_text())}
    (container,) = objects["Job"]["spec"]["template"]["spec"]["containers"]
    mounted = tmp_path / "mounted.yaml"
    mounted.write_text(objects["ConfigMap"]["data"]["recipe.yaml"])
    given = {one["name"]: one["value"] for one in container["env"]}
    given |= {"MASTER_ADDR": four_nodes[0].address, "RECIPE": str(mounted), "PYTHONPATH": str(ROOT)}
    pods = [
        subprocess.Popen(
            node.inside(container["command"]),
            env={**os.environ, **given, "JOB_COMPLETION_INDEX": str(node.number)},
            cwd=ROOT,
        )
        for node in four_nodes[:2]
    ]
    try:
        codes = [pod.wait(SECONDS) for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert codes == [0, 0]
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2]


def test_the_doctor_names_a_slow_link(four_nodes: list[network.Node], recipe_file: Path, tmp_path: Path) -> None:
    network.shape(four_nodes[3], 100)
    out = tmp_path / "report.json"
    ranks = []
    for node in four_nodes:
        place = {"RANK": str(node.number), "LOCAL_RANK": "0", "GROUP_RANK": str(node.number), "WORLD_SIZE": "4"}
        place |= {"MASTER_ADDR": four_nodes[0].address, "MASTER_PORT": "29617", "GLOO_SOCKET_IFNAME": "eth0"}
        place |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "m2_ds.doctor", "--config", str(recipe_file), "--json", str(out), "--silent"]
        ranks.append(subprocess.Popen(node.inside(command), env={**os.environ, **place}, cwd=ROOT))
    try:
        codes = [rank.wait(SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0, 0, 0]
    found = {result["name"]: result for result in json.loads(out.read_text())["results"]}
    assert found["connections"]["status"] == "ok" and "each of 4 hosts" in found["connections"]["found"]
    links = found["links between hosts"]
    assert links["status"] == "warn" and "4 link(s)" in links["found"], links
    slow = links["found"].rpartition("; ")[2]
    assert slow.startswith(("rank 2 (", "rank 3 (")), links  # to or from the node behind the slow link
    assert found["clocks"]["status"] == "ok" and found["one run folder"]["status"] == "ok"
