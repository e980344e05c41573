"""How ranks are laid out: tensor, data and pipeline parallel, and which data-parallel ones form a contrast group."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from m2_ds.schema import Settings

Placement = Literal["contiguous", "strided"]


class ContrastGroupConfig(Settings):
    """Size and placement of contrast groups over the data-parallel ranks. Nothing set: one group of all ranks."""

    size: int | None = Field(None, ge=1, description="data-parallel ranks a group; 1: every rank on its own")
    nodes: int | None = Field(None, ge=1, description="whole nodes a group, instead of size")
    placement: Placement = Field(
        "contiguous", description="contiguous: neighbouring ranks, strided: ranks as far apart as the groups are many"
    )
    cross_nodes: bool = Field(True, description="false: refuse groups whose ranks lie on several nodes")

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.size is not None and self.nodes is not None:
            raise ValueError(f"give size ({self.size} ranks) or nodes ({self.nodes}), not both")
        if self.nodes is not None and self.placement == "strided":
            raise ValueError("nodes asks for whole nodes, which are contiguous; placement strided goes with size")
        return self


class ParallelConfig(Settings):
    """How the ranks are laid out. What is left after tensor and pipeline parallelism is data-parallel."""

    tensor_parallel_size: int = Field(1, ge=1, description="ranks over which heads and widths of a layer are cut")
    pipeline_parallel_size: int = Field(1, ge=1, description="stages into which the layers are cut")
    pipeline_balance: Literal["arithmetic", "memory"] = Field(
        "arithmetic",
        description="what the stages have as equal shares of as layers allow: counted operations, or state",
    )
    pipeline_layers: list[int] | None = Field(
        None, description="layers of each stage, where they were measured; None: by pipeline_balance"
    )
    sequence_parallel: bool = Field(
        False,
        description="cut the tokens of norms and residuals over the tensor-parallel ranks, too: activations there take "
        "1/tensor_parallel_size of the memory, and a layer sends 1.25 times as much",
    )
    contrast_group: ContrastGroupConfig = ContrastGroupConfig()

    @model_validator(mode="after")
    def _something_to_cut_over(self) -> Self:
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_parallel_size > 1: it cuts tokens over those ranks")
        if self.pipeline_layers is not None and len(self.pipeline_layers) != self.pipeline_parallel_size:
            raise ValueError(
                f"pipeline_layers names {len(self.pipeline_layers)} stages, pipeline_parallel_size is "
                f"{self.pipeline_parallel_size}"
            )
        return self


@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes and the rank order: tensor fastest, then data, then pipeline (tp-dp-pp).

    It is Megatron-core's default order and DeepSpeed's ``PipeModelDataParallelTopology``: neighbouring ranks, on the
    fastest links, share layers; stages lie farthest apart.
    """

    tensor: int
    data: int
    pipeline: int

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> "Layout":
        """Raises ValueError where the sizes do not divide the ranks."""
        tensor, pipeline = config.tensor_parallel_size, config.pipeline_parallel_size
        data, rest = divmod(world_size, tensor * pipeline)
        if rest or not data:
            raise ValueError(
                f"parallel.tensor_parallel_size {tensor} x parallel.pipeline_parallel_size {pipeline} does not divide "
                f"{world_size} rank(s); start a multiple of {tensor * pipeline}, or set sizes whose product is one of "
                f"{_divisors(world_size)}"
            )
        return cls(tensor, data, pipeline)

    def rank(self, tensor: int, data: int, stage: int) -> int:
        return (stage * self.data + data) * self.tensor + tensor

    def place(self, rank: int) -> tuple[int, int, int]:
        """(tensor, data, stage) coordinates of a rank."""
        return rank % self.tensor, rank // self.tensor % self.data, rank // (self.tensor * self.data)


def contrast_groups(ranks: int, config: ContrastGroupConfig, nodes: list[str]) -> list[list[int]]:
    """The data-parallel ranks of every contrast group, in the order in which all ranks create them.

    ``nodes``: the node of each data-parallel rank. Raises ValueError, with sizes that would do, for groups that do not
    divide or that lie on several nodes against ``cross_nodes``.
    """
    size = _size(ranks, config, nodes)
    count = ranks // size
    groups = (
        [list(range(first, ranks, count)) for first in range(count)]
        if config.placement == "strided"
        else [list(range(first, first + size)) for first in range(0, ranks, size)]
    )
    for group in groups:
        there = {nodes[rank] for rank in group}
        if len(there) > 1 and not config.cross_nodes:
            within = _largest_within(ranks, nodes)
            raise ValueError(
                f"parallel.contrast_group: ranks {group} lie on {len(there)} nodes ({', '.join(sorted(there))}) and "
                f"cross_nodes is false; use size {within} with placement contiguous, or set cross_nodes: true"
            )
    return groups


def _size(ranks: int, config: ContrastGroupConfig, nodes: list[str]) -> int:
    if config.nodes is not None:
        order = list(dict.fromkeys(nodes))
        by_node = [nodes.count(node) for node in order]
        if len(set(by_node)) > 1 or nodes != [node for node in order for _ in range(by_node[0])]:
            raise ValueError(
                f"parallel.contrast_group.nodes: nodes carry {by_node} ranks or do not hold neighbouring ones; groups "
                "of whole nodes need equal nodes. Use size (in ranks) instead"
            )
        if len(order) % config.nodes:
            raise ValueError(
                f"parallel.contrast_group.nodes {config.nodes} does not divide {len(order)} nodes; "
                f"use one of {_divisors(len(order))}"
            )
        return config.nodes * by_node[0]
    size = ranks if config.size is None else config.size
    if ranks % size:
        raise ValueError(
            f"parallel.contrast_group.size {size} does not divide {ranks} data-parallel ranks; "
            f"use one of {_divisors(ranks)}"
        )
    return size


def _largest_within(ranks: int, nodes: list[str]) -> int:
    """The largest size at which contiguous groups stay on their node."""
    return max(
        size
        for size in _divisors(ranks)
        if all(len(set(nodes[first : first + size])) == 1 for first in range(0, ranks, size))
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
