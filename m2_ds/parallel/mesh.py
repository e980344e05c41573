"""Ranks and their process groups. The only place that knows the world; everything else is handed a group.

Today every rank is a data-parallel rank; tensor, pipeline and contrast groups are further members of `Mesh`.
"""

import datetime
import importlib
import logging
import os
import shutil
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """An ordered set of ranks that communicate. ``rank`` is this process's place among ``size``."""

    rank: int
    size: int
    process_group: dist.ProcessGroup | None  # None: a group of one, which never communicates

    @property
    def is_first(self) -> bool:
        return self.rank == 0


SOLO = Group(0, 1, None)


@dataclass(frozen=True)
class Mesh:
    """Where this process stands. ``device``: the accelerator it drives (or cpu)."""

    rank: int
    world_size: int
    device: torch.device
    backend: str
    data_parallel: Group

    @property
    def is_first(self) -> bool:
        """True on the one process that writes logs and files."""
        return self.rank == 0

    @staticmethod
    def start(timeout_minutes: float = 30.0, build_shared_memory_op: bool = False) -> "Mesh":
        """Join the job that the launcher described in the environment (none: a job of one process).

        DeepSpeed compiles a shared-memory op for CPU ranks of one host at first use (about a minute, needs g++);
        ``build_shared_memory_op`` asks for it, gloo is used otherwise.
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
        deepspeed.init_distributed(
            dist_backend=backend, timeout=datetime.timedelta(minutes=timeout_minutes), verbose=False
        )
        log.info("rank %d of %d on %s, backend %s", rank, world_size, device, backend)
        group = Group(rank, world_size, dist.group.WORLD) if world_size > 1 else SOLO
        return Mesh(rank, world_size, device, backend, group)

    def stop(self) -> None:
        """Leave the job; every rank calls it at the end."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _single_process_environment() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _use_plain_gloo() -> None:
    # DeepSpeed's CPU backend compiles this op unconditionally; without it, it falls back to torch.distributed.
    # (`import deepspeed.comm.torch as ...` would give torch itself: the package has an attribute of that name.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
