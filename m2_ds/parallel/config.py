"""Which ranks form a contrast group: the ranks over which the contrastive loss aggregates its negatives."""

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
    """How the ranks are laid out."""

    contrast_group: ContrastGroupConfig = ContrastGroupConfig()


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
