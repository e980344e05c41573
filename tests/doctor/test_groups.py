"""Groups measured by real ranks, and lines made of what ranks measured: errors, slow links, slow ranks."""

import pytest
import torch

from m2_ds.config import RunConfig
from m2_ds.doctor import groups
from m2_ds.doctor.groups import Measured, results
from m2_ds.parallel.mesh import Mesh
from tests.engine.jobs import changed, config_of
from tests.support.ranks import run_ranks

NAMES = {rank: f"rank {rank} (host{rank // 2})" for rank in range(8)}


def measured(mesh: Mesh, config: RunConfig) -> tuple[list[Measured], list[Measured]]:
    """As it is, and with sums that come out wrong on rank 1."""
    mesh = mesh.with_layout(config.parallel)
    honest = groups.measure(mesh, config.engine.precision, [0, 2])
    start = groups.start_all_reduce

    def wrong(x: torch.Tensor, *arguments: object) -> object:
        work = start(x, *arguments)  # type: ignore[arg-type]
        if mesh.rank == 1:
            work.wait()
            x += 1
        return work

    groups.start_all_reduce = wrong  # type: ignore[assignment]
    return honest, groups.measure(mesh, config.engine.precision, [0, 2])


@pytest.mark.slow
@pytest.mark.distributed
def test_every_group_of_a_mesh_is_measured(tree: dict[str, object]) -> None:
    config = config_of(changed(tree, {"parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}}))
    both = dict(enumerate(run_ranks(4, measured, config, seconds=250)))
    found = {rank: honest for rank, (honest, _) in both.items()}
    lines = {result.name: result for result in results(found, NAMES, 1e6)}
    assert lines.keys() == {
        "all ranks", "tensor-parallel", "pipeline-parallel", "contrast", "pipeline neighbours", "links between hosts",
        "arithmetic",
    }  # fmt: skip
    assert not [result for result in lines.values() if result.status == "fail"], lines
    assert "2 group(s) of 2: all-reduce" in lines["tensor-parallel"].found
    assert "gradients of a step (1.0 MB) take about" in lines["all ranks"].found
    assert lines["pipeline neighbours"].found.startswith("2 link(s)")
    assert lines["links between hosts"].found.startswith("2 link(s)")
    assert all(one.speed > 0 for some in found.values() for one in some)
    lied = {result.name: result for result in results({rank: lied for rank, (_, lied) in both.items()}, NAMES, 0)}
    assert lied["all ranks"].status == "fail"
    assert "wrong numbers (seen by rank 1 (host0))" in lied["all ranks"].found
    assert lied["pipeline neighbours"].status != "fail"


def _one_leaves(mesh: Mesh, config: RunConfig) -> list[Measured]:
    groups.STEP_LIMIT_S = 2.0
    return [] if mesh.rank else groups.measure(mesh, "bf16", [0])


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_takes_no_part_is_noticed_in_time(config: RunConfig) -> None:
    found = dict(enumerate(run_ranks(2, _one_leaves, config, seconds=250)))
    (line,) = results(found, NAMES, 0)
    assert line.status == "fail" and line.name == "all ranks"


def group(name: str, speed: float, axis: str = "data-parallel") -> Measured:
    return Measured(axis, name, 4, speed, 2 * speed, 1e-5)


def test_a_slow_group_is_named() -> None:
    found = {rank: [group(f"group {rank // 2}", 4e9 if rank // 2 == 1 else 20e9)] for rank in range(8)}
    (line,) = results(found, NAMES, 10e9)
    assert line.status == "warn" and "group 1 has 20% of the usual rate" in line.found
    assert "4 group(s) of 4: all-reduce 4.0 GB/s, all-gather 8.0 GB/s a rank, 10 us" in line.found
    assert "gradients of a step (10.0 GB) take about 3.8 s" in line.found
    found = {rank: [group(f"group {rank // 2}", 19e9 if rank // 2 == 1 else 20e9)] for rank in range(8)}
    assert results(found, NAMES, 0)[0].status == "ok"


def test_a_slow_link_between_hosts_is_named() -> None:
    speeds = {(0, 2): 10e9, (2, 4): 1e9, (4, 6): 10e9, (6, 0): 11e9}
    found = {to: [Measured("links between hosts", f"{of} to {to}", 2, speed)] for (of, to), speed in speeds.items()}
    (line,) = results(found, NAMES, 0)
    assert line.status == "warn" and "rank 2 (host1) to rank 4 (host2) has 10% of the usual rate" in line.found


def test_the_slowest_rank_is_named() -> None:
    found = {
        rank: [Measured("arithmetic", f"rank {rank}", speed=(50 if rank == 5 else 100) * 1e9)] for rank in range(8)
    }
    (line,) = results(found, NAMES, 0)
    assert line.section == "ranks" and line.status == "warn"
    assert "slowest rank 5 (host2) with 50, 50% of the usual" in line.found


def test_an_error_that_many_met_with_is_told_once() -> None:
    found = {rank: [Measured("all ranks", "all ranks", error="no answer within 60 s")] for rank in range(8)}
    (line,) = results(found, NAMES, 0)
    assert line.status == "fail" and line.found.count("no answer") == 1 and "NCCL_DEBUG" in line.remedy


def test_gradients_of_a_rank(tree: dict[str, object]) -> None:
    config = config_of(changed(tree, {"parallel.tensor_parallel_size": 2, "engine.precision": "bf16"}))
    assert groups.gradients(config, 1000) == 1000
