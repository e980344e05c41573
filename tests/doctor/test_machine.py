"""What a host lacks is told with a remedy, one fault at a time."""

import shutil
from collections import namedtuple
from typing import Any

import psutil
import pytest
import torch

from m2_ds.config import RunConfig
from m2_ds.doctor import machine
from m2_ds.doctor.machine import Place
from tests.engine.jobs import changed, config_of

Usage = namedtuple("Usage", "total used free")
ALONE = Place()


def test_this_machine_has_what_the_package_asks_for() -> None:
    verdict = machine.versions()
    assert verdict.status == "ok" and torch.__version__ in verdict.found, verdict


def test_versions_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.version
    monkeypatch.setattr(machine, "version", lambda name: "2.5.1" if name == "torch" else found(name))
    verdict = machine.versions()
    assert verdict.status == "fail" and verdict.found == "torch 2.5.1 is not >=2.6" and "pip install" in verdict.remedy

    def missing(name: str) -> str:
        if name == "peft":
            raise machine.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(machine, "version", missing)
    assert machine.versions().found == "peft is not installed"


def test_ranges_are_those_of_the_checkout() -> None:
    python, packages = machine.required()
    assert "3.10" not in python and "3.11" in python
    ranges = {one.name: str(one.specifier) for one in packages}
    assert ranges["torch"] == ">=2.6" and "pytest" not in ranges and "resvg-py" not in ranges


def test_cores(config: RunConfig, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    assert machine.cores(config, Place(ranks_here=4, world_size=4)).status == "ok"
    many = machine.cores(config_of(changed(tree, {"engine.threads": 3})), Place(ranks_here=2, world_size=2))
    assert many.status == "warn" and "6 at once" in many.found and "at most 4" in many.remedy
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 0.0, 0.0))
    assert "other processes use these cores" in machine.cores(config, ALONE).remedy


def test_memory(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Memory = namedtuple("Memory", "total available")
    config = config_of(
        changed(tree, {"data.picture_cache_mb": 1000, "data.row_group_cache_mb": 200, "data.workers": 2})
    )
    for total, available, status in ((16e9, 8e9, "ok"), (16e9, 1e9, "warn"), (2e9, 1e9, "fail")):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total, free=available: Memory(total, free))
        verdict = machine.memory(config, ALONE)
        assert verdict.status == status, verdict
    # Two loader processes of 1,200 MB, and weights, gradients and two moments in fp32.
    assert "may take 2.5 GB" in verdict.found and "data.workers" in verdict.remedy


def test_shared_memory(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(changed(tree, {"data.workers": 4, "data.prefetch": 8}))
    assert machine.shared_memory(config, ALONE).status == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 << 10, 0, 64 << 10))
    verdict = machine.shared_memory(config, ALONE)
    assert verdict.status == "fail" and "--shm-size" in verdict.remedy and "65.5 kB free" in verdict.found


def test_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 1024))
    verdict = machine.open_files()
    assert verdict.status == "warn" and "ulimit -n 1024" in verdict.remedy
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    monkeypatch.setattr(machine, "Path", lambda _: Nowhere())
    assert machine.open_files().status == "ok"


class Nowhere:
    def exists(self) -> bool:
        return False


def test_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert machine.network(ALONE).status == "ok"
    several = Place(world_size=4, ranks_here=2)
    monkeypatch.setattr("socket.gethostbyname", lambda _: "127.0.1.1")
    verdict = machine.network(several)
    assert verdict.status == "warn" and "other hosts cannot reach it" in verdict.found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert machine.network(several).status == "ok"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    assert "no such interface here" in machine.network(several).found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "l")
    assert machine.network(ALONE).status == "fail"  # gloo takes whole names
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "l")
    assert machine.network(ALONE).status == "ok"  # NCCL beginnings

    def unknown(_: str) -> str:
        raise OSError

    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setattr("socket.gethostbyname", unknown)
    assert machine.network(several).status == "fail" and machine.network(ALONE).status == "ok"


def test_kernels_that_are_asked_for(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.kernels(config_of(tree)).status == "skipped"
    check = machine.Check(
        "machine", "kernels", lambda: machine.kernels(config_of(changed(tree, {"engine.apex": True})))
    )
    result = check.run()
    assert result.status == "fail" and "engine.apex" in result.found
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "install both" in machine.kernels(config_of(changed(tree, {"engine.build_ops": True}))).remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_devices_without_gpus(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.devices(config, ALONE).status == "ok"
    monkeypatch.setattr(machine, "_DEVICE_NODE", machine.Path("/dev/null"))
    assert "CUDA build of torch" in machine.devices(config, ALONE).remedy


class Card:
    """A GPU's answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, free: float, bf16: bool = True) -> None:
        answers: dict[str, Any] = {
            "is_available": lambda: True, "device_count": lambda: count, "get_device_name": lambda _: "H100",
            "mem_get_info": lambda _: (free, 80e9), "is_bf16_supported": lambda _: bf16,
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
        monkeypatch.setattr(machine, "_driver", lambda: "580.1")


@pytest.mark.parametrize(
    ("count", "free", "bf16", "ranks", "changes", "status", "words"),
    [
        (8, 79e9, True, 8, {}, "ok", "8 x H100, driver 580.1"),
        (4, 79e9, True, 8, {}, "fail", "8 ranks on this host, and torch sees 4"),
        (8, 9e9, True, 8, {}, "warn", "GPU 0 has 9.0 GB of 80.0 GB free"),
        (8, 79e9, False, 8, {"engine.precision": "bf16"}, "fail", "no bf16"),
        (1, 79e9, True, 1, {"model": {"preset": "10b"}, "data.image_size": 224}, "fail", "take 155 GB a rank"),
    ],
)
def test_devices_with_gpus(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, count: int, free: float, bf16: bool, ranks: int,
    changes: dict[str, Any], status: str, words: str,
) -> None:  # fmt: skip
    Card(monkeypatch, count, free, bf16)
    if "model" in changes:
        changes = {**changes, "optim.rules": []}
    verdict = machine.devices(config_of(changed(tree, changes)), Place(ranks_here=ranks, world_size=ranks))
    assert verdict.status == status and words in verdict.found, verdict
