"""Ranks and their process groups. The only place that knows the world; everything else is handed a group."""

import datetime
import importlib
import logging
import os
import shutil
import socket
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from m2_ds.parallel.config import ContrastGroupConfig, Layout, ParallelConfig, contrast_groups
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

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


SOLO = Group(0, 1, None)


@dataclass(frozen=True)
class Mesh:
    """Where this process stands. ``device``: the accelerator it drives (or cpu).

    ``tensor``: the ranks that share every layer and see the same batch; ``pipeline``: those that hold the stages of one
    model; ``data_parallel``: those that hold the same weights and see other batches. ``contrast``: the ranks whose
    pairs are each other's negatives, ``contrast_ranks`` data-parallel ones and their tensor-parallel ones, who each
    compute a share of the loss; it exists on the last stage. ``contrast_groups``: how many such groups there are.
    ``traffic``: what all groups of this process and DeepSpeed have sent.
    """

    rank: int
    world_size: int
    device: torch.device
    backend: str
    layout: Layout
    world: Group
    data_parallel: Group
    tensor: Group
    pipeline: Group
    contrast: Group
    contrast_ranks: int
    contrast_groups: int
    traffic: Traffic
    timeout: datetime.timedelta

    @property
    def is_first(self) -> bool:
        """True on the one process that writes logs and files."""
        return self.rank == 0

    @property
    def mpu(self) -> "ModelParallelUnit | None":
        """What DeepSpeed asks about model parallelism; None where there is none. (Its pipelines bring their own.)"""
        return ModelParallelUnit(self) if self.tensor.size > 1 else None

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
        world = Group(0, 1, None, traffic=traffic)
        if world_size > 1:
            world = Group(rank, world_size, dist.group.WORLD, "all ranks", traffic)
        alone = Mesh(
            rank, world_size, device, backend, Layout(1, world_size, 1), world, world, SOLO, SOLO, SOLO, 1, 1, traffic,
            timeout,
        )  # fmt: skip
        return alone.with_layout(config or ParallelConfig())

    @staticmethod
    def imagined(layout: Layout, rank: int = 0) -> "Mesh":
        """The place of a rank in a job that does not run: sizes and coordinates, no communication."""
        tensor, data, stage = layout.place(rank)
        world, traffic = layout.tensor * layout.data * layout.pipeline, Traffic()
        axes = [Group(tensor, layout.tensor, None), Group(data, layout.data, None), Group(stage, layout.pipeline, None)]
        contrast = Group(data * layout.tensor + tensor, layout.data * layout.tensor, None)
        return Mesh(
            rank, world, torch.device("cpu"), "none", layout, Group(rank, world, None), axes[1], axes[0], axes[2],
            contrast, layout.data, 1, traffic, datetime.timedelta(0),
        )  # fmt: skip

    def with_layout(self, config: ParallelConfig, timeout_minutes: float | None = None) -> "Mesh":
        """The same ranks laid out another way; every rank calls it. Its own groups are kept until `stop`."""
        timeout = self.timeout if timeout_minutes is None else datetime.timedelta(minutes=timeout_minutes)
        layout = Layout.of(config, self.world_size)
        mesh = replace(self, layout=layout, timeout=timeout)
        axes = (mesh.world, SOLO, SOLO)
        if layout.data < self.world_size:
            axes = _axes(mesh)
            log.info(
                "layout: %d tensor x %d data x %d pipeline-parallel ranks", layout.tensor, layout.data, layout.pipeline
            )
        mesh = replace(mesh, data_parallel=axes[0], tensor=axes[1], pipeline=axes[2])
        return mesh.with_contrast_group(config.contrast_group)

    def with_contrast_group(self, config: ContrastGroupConfig) -> "Mesh":
        """The same layout with other contrast groups; every rank calls it."""
        contrast, ranks, count = _contrast_group(self, config)
        return replace(self, contrast=contrast, contrast_ranks=ranks, contrast_groups=count)

    def beside(self) -> "Mesh":
        """The same ranks and axes on the host, with groups of their own; every rank calls it.

        For a thread beside training: its collectives meet none of the training's. It has no contrast group.
        """
        traffic = Traffic()
        groups = [_over_gloo(self, axis, traffic) for axis in (None, self.data_parallel, self.tensor, self.pipeline)]
        return replace(
            self, device=torch.device("cpu"), backend="gloo", world=groups[0], data_parallel=groups[1],
            tensor=groups[2], pipeline=groups[3], contrast=SOLO, traffic=traffic,
        )  # fmt: skip

    def stop(self) -> None:
        """Leave the job; every rank calls it at the end."""
        if dist.is_initialized():
            dist.destroy_process_group()  # and with it every group that was made


class ModelParallelUnit:
    """The questions of DeepSpeed's engines, answered from a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._data, self._tensor = mesh.data_parallel, mesh.tensor
        self._data_group = mesh.data_parallel.process_group
        if self._data_group is None:  # one data-parallel rank: DeepSpeed wants a group all the same
            self._data_group = _megatron_state().get_data_parallel_group()

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> Any:
        return self._tensor.process_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_group(self) -> Any:
        return self._data_group


def _megatron_state() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="megatron")  # that it found no apex: ours is told by m2_ds.model
        return importlib.import_module("megatron.core.parallel_state")


def _axes(mesh: Mesh) -> tuple[Group, Group, Group]:
    """This rank's data-, tensor- and pipeline-parallel groups: Megatron-core's, whose layers look for them there."""
    state, layout = _megatron_state(), mesh.layout
    if state.model_parallel_is_initialized():
        state.destroy_model_parallel()
    state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        distributed_timeout_minutes=mesh.timeout.total_seconds() / 60,
        create_gloo_process_groups=False,
    )
    _assert_order(layout)
    tensor, data, stage = layout.place(mesh.rank)
    along = {
        "data": [layout.rank(tensor, d, stage) for d in range(layout.data)],
        "tensor": [layout.rank(t, data, stage) for t in range(layout.tensor)],
        "pipeline": [layout.rank(tensor, data, s) for s in range(layout.pipeline)],
    }
    made = {
        "data": state.get_data_parallel_group(),
        "tensor": state.get_tensor_model_parallel_group(),
        "pipeline": state.get_pipeline_model_parallel_group(),
    }
    groups = {}
    for axis, ranks in along.items():
        found = dist.get_process_group_ranks(made[axis])
        assert found == ranks, f"Megatron-core put ranks {found} into the {axis}-parallel group, not {ranks}"
        name = f"the {axis}-parallel group of ranks {', '.join(map(str, ranks))}"
        alone = len(ranks) == 1
        groups[axis] = Group(ranks.index(mesh.rank), len(ranks), None if alone else made[axis], name, mesh.traffic)
    return groups["data"], groups["tensor"], groups["pipeline"]


def _assert_order(layout: Layout) -> None:
    """DeepSpeed's pipelines number ranks by a topology of their own: it must be ours."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(layout.pipeline, layout.tensor, layout.data)
    for rank in range(layout.tensor * layout.data * layout.pipeline):
        coordinates = topology.get_coord(rank)
        theirs = (coordinates.model, coordinates.data, coordinates.pipe)
        assert theirs == layout.place(rank), f"rank {rank} is at {theirs} for DeepSpeed, at {layout.place(rank)} here"


def _over_gloo(mesh: Mesh, axis: Group | None, traffic: Traffic) -> Group:
    """A second group of the ranks of an ``axis`` (None: of all). Every rank makes those of all lines, in one order."""
    own = list(range(mesh.world_size))
    if axis is not None:
        own = dist.get_process_group_ranks(axis.process_group) if axis.process_group is not None else [mesh.rank]
    lines: list[list[int] | None] = [None] * mesh.world_size
    if mesh.world_size > 1:
        dist.all_gather_object(lines, own, group=mesh.world.process_group)
    mine = Group(own.index(mesh.rank), len(own), None, traffic=traffic)
    for line in sorted({tuple(line) for line in lines if line is not None and len(line) > 1}):
        name = f"ranks {', '.join(map(str, line))}, beside training"
        made = dist.new_group(list(line), timeout=mesh.timeout, backend="gloo", group_desc=name)
        if mesh.rank in line:
            mine = Group(line.index(mesh.rank), len(line), made, name, traffic)
    return mine


def _contrast_group(mesh: Mesh, config: ContrastGroupConfig) -> tuple[Group, int, int]:
    """This rank's contrast group, its data-parallel ranks, and the number of groups.

    Every rank makes all groups, in one order.
    """
    layout, last = mesh.layout, mesh.layout.pipeline - 1
    nodes: list[str | None] = [_node()] * mesh.world_size
    if mesh.world_size > 1:
        dist.all_gather_object(nodes, _node(), group=mesh.world.process_group)
    groups = contrast_groups(
        layout.data, config, [str(nodes[layout.rank(0, data, last)]) for data in range(layout.data)]
    )
    ranks = len(groups[0])
    size = ranks * layout.tensor
    log.info(
        "contrast: %d group(s) of %d data-parallel rank(s), %s, over %s%s", len(groups), ranks, config.placement,
        mesh.backend,
        " with a communicator and a high-priority stream of its own" if mesh.backend == "nccl" and size > 1 else "",
    )  # fmt: skip
    mine = Group(0, 1, None, f"contrast group {layout.place(mesh.rank)[1]}", mesh.traffic)
    if size == 1:
        return mine, ranks, len(groups)
    for number, members in enumerate(groups):
        everyone = [layout.rank(tensor, data, last) for data in members for tensor in range(layout.tensor)]
        name = f"contrast group {number} (ranks {', '.join(map(str, everyone))})"
        made = dist.new_group(
            everyone, timeout=mesh.timeout, group_desc=name, **_communicator(mesh.device, mesh.backend)
        )
        if mesh.rank in everyone:
            mine = Group(everyone.index(mesh.rank), size, made, name, mesh.traffic)
    return mine, ranks, len(groups)


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
