"""Ranks and their process groups. The only place that knows the world; everything else is handed a group.

Today every rank is a data-parallel rank; tensor and pipeline groups are further members of `Mesh`.
"""

import datetime
import importlib
import logging
import os
import shutil
import socket
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from m2_ds.parallel.config import ContrastGroupConfig, ParallelConfig, contrast_groups
from m2_ds.parallel.traffic import Traffic, count_deepspeed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """An ordered set of ranks that communicate. ``rank`` is this process's place among ``size``.

    ``name`` tells it apart in errors; ``traffic`` counts what its collectives send.
    """

    rank: int
    size: int
    process_group: dist.ProcessGroup | None  # None: a group of one, which never communicates
    name: str = "a group of one"
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def is_first(self) -> bool:
        return self.rank == 0


SOLO = Group(0, 1, None)


@dataclass(frozen=True)
class Mesh:
    """Where this process stands. ``device``: the accelerator it drives (or cpu).

    ``contrast``: the data-parallel ranks whose pairs are each other's negatives; ``contrast_groups``: how many such
    groups there are. ``traffic``: what all groups of this process and DeepSpeed have sent.
    """

    rank: int
    world_size: int
    device: torch.device
    backend: str
    data_parallel: Group
    contrast: Group
    contrast_groups: int
    traffic: Traffic

    @property
    def is_first(self) -> bool:
        """True on the one process that writes logs and files."""
        return self.rank == 0

    @staticmethod
    def start(
        config: ParallelConfig | None = None, timeout_minutes: float = 30.0, build_shared_memory_op: bool = False
    ) -> "Mesh":
        """Join the job that the launcher described in the environment (none: a job of one process).

        DeepSpeed compiles a shared-memory op for CPU ranks of one host at first use (about a minute, needs g++);
        ``build_shared_memory_op`` asks for it, gloo is used otherwise. Raises ValueError for groups that do not fit.
        """
        import deepspeed

        for name, value in _single_process_environment().items():
            os.environ.setdefault(name, value)
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        if torch.cuda.is_available():
            device, backend = torch.device("cuda", local_rank), "nccl"
            torch.cuda.set_device(device)
        else:
            device, backend = torch.device("cpu"), "gloo"
            if not build_shared_memory_op:
                _use_plain_gloo()
            elif shutil.which("g++") is None:
                raise ValueError("the shared-memory op was asked for, but there is no g++; install it or leave it out")
        timeout = datetime.timedelta(minutes=timeout_minutes)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        log.info("rank %d of %d on %s, backend %s", rank, world_size, device, backend)
        traffic = Traffic()
        count_deepspeed(_deepspeed_backend(), traffic)
        everyone = (
            Group(rank, world_size, dist.group.WORLD, "the data-parallel group", traffic)
            if world_size > 1
            else Group(0, 1, None, traffic=traffic)
        )
        contrast, count = _contrast_group(
            everyone, (config or ParallelConfig()).contrast_group, device, backend, timeout, traffic
        )
        return Mesh(rank, world_size, device, backend, everyone, contrast, count, traffic)

    def with_contrast_group(self, config: ContrastGroupConfig, timeout_minutes: float = 30.0) -> "Mesh":
        """The same ranks with other contrast groups; every rank calls it. Its own are kept until `stop`."""
        timeout = datetime.timedelta(minutes=timeout_minutes)
        contrast, count = _contrast_group(self.data_parallel, config, self.device, self.backend, timeout, self.traffic)
        return replace(self, contrast=contrast, contrast_groups=count)

    def stop(self) -> None:
        """Leave the job; every rank calls it at the end."""
        if dist.is_initialized():
            dist.destroy_process_group()  # and with it every group that was made


def _contrast_group(
    data_parallel: Group,
    config: ContrastGroupConfig,
    device: torch.device,
    backend: str,
    timeout: datetime.timedelta,
    traffic: Traffic,
) -> tuple[Group, int]:
    """This rank's contrast group and the number of groups. Every rank makes all groups, in one order."""
    nodes: list[str | None] = [_node()] * data_parallel.size
    if data_parallel.size > 1:
        dist.all_gather_object(nodes, _node(), group=data_parallel.process_group)
    groups = contrast_groups(data_parallel.size, config, [str(node) for node in nodes])
    size = len(groups[0])
    log.info(
        "contrast: %d group(s) of %d rank(s), %s, over %s%s", len(groups), size, config.placement, backend,
        " with a communicator and a high-priority stream of its own" if backend == "nccl" and size > 1 else "",
    )  # fmt: skip
    if size == 1:
        return Group(0, 1, None, f"contrast group {data_parallel.rank}", traffic), len(groups)
    mine = None
    for number, ranks in enumerate(groups):
        name = f"contrast group {number} (ranks {', '.join(map(str, ranks))})"
        made = dist.new_group(ranks, timeout=timeout, group_desc=name, **_communicator(device, backend))
        if data_parallel.rank in ranks:
            mine = Group(ranks.index(data_parallel.rank), size, made, name, traffic)
    assert mine is not None
    return mine, len(groups)


def _communicator(device: torch.device, backend: str) -> dict[str, Any]:
    """On NCCL: made at once, so that a group that cannot be connected shows at start; its kernels go first."""
    if backend != "nccl":
        return {}
    return {"device_id": device, "pg_options": dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)}


def _node() -> str:
    """The node that this process runs on: its number as the launcher says it, else the host's name."""
    number = os.environ.get("GROUP_RANK") or os.environ.get("CROSS_RANK")
    return f"node {number}" if number else socket.gethostname()


def _deepspeed_backend() -> Any:
    return importlib.import_module("deepspeed.comm.comm").cdb


def _single_process_environment() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _use_plain_gloo() -> None:
    # DeepSpeed's CPU backend compiles this op unconditionally; without it, it falls back to torch.distributed.
    # (`import deepspeed.comm.torch as ...` would give torch itself: the package has an attribute of that name.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
