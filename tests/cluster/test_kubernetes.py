"""The manifest: objects that Kubernetes takes, names that fit, and a script that carries codes and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from m2_ds.cluster.command import kubernetes
from m2_ds.config import load_config
from tests.cluster.conftest import RECIPE
from tests.cluster.manifest import wrong_fields

ROOT = Path(__file__).parents[2]
QUOTED = "a=\"b\" 'c' <d> & {{e}}"
FULL = {
    "name": "m2-ten", "namespace": "vision", "volume": ("pairs:/data", "runs.2:/workspace/runs"),
    "resource": ("rdma/ib=1",), "node_selector": ("gpu=h100", "spot=true"), "interface": "eth0",
    "environment": ("NCCL_DEBUG=INFO", f"QUOTED={QUOTED}"), "overrides": ("seed=5",),
}  # fmt: skip


def documents(folder: Path, **settings: Any) -> dict[str, Any]:
    out = folder / "job.yaml"
    kubernetes(RECIPE, out=out, **{"image": "registry.example/m2:1", "nodes": 2, "gpus_per_node": 8, **settings})
    return {document["kind"]: document for document in yaml.safe_load_all(out.read_text())}


@pytest.mark.parametrize(
    "settings", [{}, FULL, {"gpus_per_node": 0, "ranks_per_node": 2, "doctor": False, "restarts": 0}]
)
def test_the_api_takes_every_object(tmp_path: Path, settings: dict[str, Any]) -> None:
    pytest.importorskip("lightkube.models", reason="pip install lightkube-models")
    found = documents(tmp_path, **settings)
    assert list(found) == ["ConfigMap", "Service", "Job"]
    assert [wrong for document in found.values() for wrong in wrong_fields(document)] == []


def test_the_reading_is_strict(tmp_path: Path) -> None:
    pytest.importorskip("lightkube.models", reason="pip install lightkube-models")
    job = documents(tmp_path)["Job"]
    job["spec"]["completion"] = 2
    job["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = 1
    del job["spec"]["podFailurePolicy"]["rules"][0]["action"]
    job["spec"]["parallelism"] = "2"
    told = wrong_fields(job)
    for words in ("spec.completion is unknown", "env.0.value is 1, not str", "rules.0.action is missing",
                  "parallelism is '2', not int"):  # fmt: skip
        assert any(words in one for one in told), told
    assert len(told) == 4


def test_objects_fit_each_other(tmp_path: Path) -> None:
    found = documents(tmp_path, **FULL)
    job, pod = found["Job"]["spec"], found["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    name = found["Service"]["metadata"]["name"]
    assert {document["metadata"]["name"] for document in found.values()} == {"m2-ten"}
    assert {document["metadata"]["namespace"] for document in found.values()} == {"vision"}
    assert found["Service"]["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == name and environment["MASTER_ADDR"] == f"{name}-0.{name}"
    assert job["completions"] == job["parallelism"] == 2 and job["completionMode"] == "Indexed"
    assert environment["QUOTED"] == QUOTED
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "8", "rdma/ib": "1"}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounts["shared-memory"] == "/dev/shm" and mounts["volume-2"] == "/workspace/runs"
    assert pod["volumes"][1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    rules = job["podFailurePolicy"]["rules"]
    assert all(rule["onExitCodes"]["containerName"] == container["name"] for rule in rules[:2])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(found["ConfigMap"]["data"]["recipe.yaml"])
    assert load_config(recipe) == load_config(RECIPE, ("seed=5",))
    assert environment["RECIPE"] == f"{mounts['recipe']}/recipe.yaml"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "1b"}, "name: must be a lower-case letter"),
        ({"volume": ("data",)}, "write CLAIM:PATH"),
        ({"volume": ("data:relative",)}, "volumes.0.path"),
        ({"volume": ("a:/x", "b:/x")}, "name a path twice"),
        ({"memory": "64 GB"}, "memory: must be a quantity"),
        ({"environment": ("A-B=1",)}, "are no names of variables"),
        ({"nodes": 0}, "nodes: Input should be greater than or equal to 1"),
        ({"nodes": 1, "gpus_per_node": 3}, "does not divide 3 rank"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        documents(tmp_path, **settings)


def pod_script(folder: Path, **settings: Any) -> tuple[str, dict[str, str]]:
    """The script of a pod with a program in the place of the ranks' modules, and its environment."""
    job = documents(folder, gpus_per_node=0, ranks_per_node=2, python=sys.executable, **settings)["Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    script = container["command"][2].replace("m2_ds.doctor", "tests.cluster.rank_program")
    given = {one["name"]: one["value"] for one in container["env"]}
    environment = {**os.environ, **given, "MASTER_ADDR": "localhost", "PROGRAM_FOLDER": str(folder)}
    return script.replace("m2_ds.train", "tests.cluster.rank_program"), environment


@pytest.mark.parametrize(("doctor", "train", "code"), [(0, 0, 0), (1, 0, 3), (0, 2, 2), (0, 75, 75)])
def test_a_pod_ends_with_the_code_of_its_ranks(tmp_path: Path, doctor: int, train: int, code: int) -> None:
    script, environment = pod_script(tmp_path)
    environment |= {"JOB_COMPLETION_INDEX": "1", "PROGRAM_29501": str(doctor), "PROGRAM_29500": str(train)}
    done = subprocess.run(["bash", "-c", script], env=environment, cwd=ROOT, timeout=60)
    assert done.returncode == code
    noted = {path.name: path.read_text() for path in tmp_path.glob("rank-*")}
    wanted = {f"rank-29501-{rank}": f"{rank % 2} 1 4 2 --config /etc/m2/recipe.yaml" for rank in (2, 3)}
    if not doctor:
        wanted |= {name.replace("29501", "29500"): text for name, text in wanted.items()}
    assert noted == wanted


def test_a_pod_that_is_taken_away_passes_the_signal_on(tmp_path: Path) -> None:
    script, environment = pod_script(tmp_path, doctor=False)
    environment |= {"JOB_COMPLETION_INDEX": "0", "PROGRAM_29500": "waits"}
    pod = subprocess.Popen(["bash", "-c", script], env=environment, cwd=ROOT, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("rank-29500-*"))) < 2:
            assert pod.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(30) == 75
    finally:
        if pod.poll() is None:
            os.killpg(pod.pid, signal.SIGKILL)
