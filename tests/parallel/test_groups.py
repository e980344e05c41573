"""Contrast groups: which ranks they hold, what is refused, and that each rank is in the one it thinks it is in."""

import pytest
import torch
import torch.distributed as dist

from m2_ds.parallel.collectives import all_gather_objects, all_gather_rows, all_reduce_sum, start_all_gather
from m2_ds.parallel.config import ContrastGroupConfig, ParallelConfig, contrast_groups
from m2_ds.parallel.mesh import Mesh
from tests.support.ranks import run_ranks

TWO_NODES = ["a"] * 4 + ["b"] * 4


def groups(node_of: list[str], **settings: object) -> list[list[int]]:
    return contrast_groups(len(node_of), ContrastGroupConfig.model_validate(settings), node_of)


def test_sizes_and_placements() -> None:
    assert groups(TWO_NODES) == [list(range(8))]
    assert groups(TWO_NODES, size=1) == [[r] for r in range(8)]
    assert groups(TWO_NODES, size=4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups(TWO_NODES, size=4, placement="strided") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert groups(TWO_NODES, nodes=1) == groups(TWO_NODES, size=4)
    assert groups(TWO_NODES, nodes=2) == groups(TWO_NODES)
    assert groups(TWO_NODES, size=2, cross_nodes=False) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("node_of", "settings", "words"),
    [
        (TWO_NODES, {"size": 3}, r"size 3 does not divide 8 data-parallel ranks; use one of \[1, 2, 4, 8\]"),
        (["a"] * 2 + ["b"] * 2 + ["c"] * 2, {"nodes": 2}, r"nodes 2 does not divide 3 nodes; use one of \[1, 3\]"),
        (["a"] * 3 + ["b"], {"nodes": 1}, r"nodes carry \[3, 1\] ranks"),
        (["a", "b", "a", "b"], {"nodes": 1}, "do not hold neighbouring ones"),
        (
            TWO_NODES,
            {"size": 8, "cross_nodes": False},
            r"lie on 2 nodes \(a, b\).*use size 4 with placement contiguous",
        ),
        (TWO_NODES, {"size": 2, "placement": "strided", "cross_nodes": False}, r"ranks \[0, 4\] lie on 2 nodes"),
        (TWO_NODES, {"size": 2, "nodes": 1}, "not both"),
        (TWO_NODES, {"nodes": 1, "placement": "strided"}, "placement strided goes with size"),
    ],
)
def test_groups_that_do_not_fit_are_refused(node_of: list[str], settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        groups(node_of, **settings)


def everyone_in_my_group(mesh: Mesh) -> list[tuple[str, int, list[float]]]:
    found = []
    for settings in ({"size": 2}, {"size": 2, "placement": "strided"}, {"size": 1}, {}):
        here = mesh.with_contrast_group(ContrastGroupConfig.model_validate(settings))
        rows = all_gather_rows(torch.tensor([float(mesh.rank)]), here.contrast, "features")
        found.append((here.contrast.name, here.contrast_groups, rows.tolist()))
    return found


@pytest.mark.distributed
def test_a_gather_stays_inside_the_group() -> None:
    wanted = [
        (2, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (2, [[0, 2], [1, 3], [0, 2], [1, 3]]),
        (4, [[0], [1], [2], [3]]),
        (1, [[0, 1, 2, 3]] * 4),
    ]
    for rank, found in enumerate(run_ranks(4, everyone_in_my_group)):
        assert [(count, rows) for _, count, rows in found] == [(count, rows[rank]) for count, rows in wanted]
        assert found[1][0] == f"contrast group {rank % 2} (ranks {rank % 2}, {rank % 2 + 2})"


def count_bytes(mesh: Mesh) -> tuple[dict[str, float], dict[str, float]]:
    import deepspeed.comm as ds

    x, group = torch.ones(100), mesh.data_parallel
    mesh.traffic.take()
    all_reduce_sum(x, group, "sums")
    start_all_gather(x, group, "rows").wait()
    ours, seconds = mesh.traffic.take()
    assert all(seconds[kind] > 0 for kind in ours)
    ds.all_reduce(x)
    ds.all_reduce(torch.ones(1))
    ds.all_gather_into_tensor(torch.empty(400), x)
    ds.reduce_scatter_tensor(torch.empty(25), x)
    theirs, _ = mesh.traffic.take()
    return ours, theirs


@pytest.mark.distributed
def test_bytes_are_counted_as_a_ring_sends_them() -> None:
    for ours, theirs in run_ranks(4, count_bytes):
        assert ours == {"sums": 2 * 3 / 4 * 400, "rows": 3 * 400}
        assert theirs == {"gradients": 2 * 3 / 4 * 400 + 3 / 4 * 400, "control": 2 * 3 / 4 * 4, "parameters": 3 * 400}


def one_does_not_come(mesh: Mesh) -> str:
    here = mesh.with_layout(ParallelConfig(contrast_group=ContrastGroupConfig(size=2)), timeout_minutes=0.05)
    message = ""
    if mesh.rank != 3:
        try:
            all_gather_rows(torch.ones(2), here.contrast, "features")
        except RuntimeError as error:
            message = str(error)
    all_gather_objects(None, mesh.data_parallel)  # nobody leaves while others wait
    return message


@pytest.mark.distributed
def test_a_rank_that_does_not_come_is_told_by_its_group() -> None:
    messages = run_ranks(4, one_does_not_come)
    assert messages[:2] == ["", ""] and messages[3] == ""
    assert messages[2].startswith("all-gather of features in contrast group 1 (ranks 2, 3): ")


def groups_are_left(mesh: Mesh) -> bool:
    mesh.with_contrast_group(ContrastGroupConfig(size=2))
    mesh.stop()
    return dist.is_initialized()


@pytest.mark.distributed
def test_nothing_is_left_at_the_end() -> None:
    assert run_ranks(2, groups_are_left) == [False, False]
