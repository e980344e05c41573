"""One rank of each data-parallel position reads; tensor- and pipeline-parallel ones get what it read, or its error."""

from pathlib import Path
from typing import Any

import pytest
import torch

from m2_ds.data.batch import PairBatch
from m2_ds.data.stream import build_loader
from m2_ds.data.text import load_tokenizer
from m2_ds.engine.batches import StepBatches
from m2_ds.parallel.mesh import Mesh
from tests.engine.jobs import attempt, call_all, changed, config_of, curve, log_lines
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]
FIELDS = ("images", "ids", "mask", "language", "group", "slot")


def parallel(tensor: int, pipeline: int) -> dict[str, Any]:
    return {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}


def numbers(batch: PairBatch) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name).clone() for name in FIELDS}


def receive(mesh: Mesh, tree: dict[str, Any]) -> Any:
    """(data-parallel rank, stage, reads, [[micro-batch by field]], keys, bytes sent) of two steps."""
    config = config_of(tree)
    here = mesh.with_layout(config.parallel)
    batches = StepBatches(config, here, load_tokenizer(config.tokenizer), 0)
    here.traffic.take()
    steps = [next(batches) for _ in range(2)]
    sent, _ = here.traffic.take()
    batches.close()
    found = [[numbers(batch) for batch in step] for step in steps]
    keys = [batch.keys for step in steps for batch in step]
    return here.data_parallel.rank, here.pipeline.rank, batches.stream is not None, found, keys, sent.get("batches", 0)


def test_everybody_has_the_batch_and_one_reads_it(recipe: dict[str, Any]) -> None:
    layouts = [(2, 2), (2, 1), (1, 2)]
    trees = [
        changed(recipe, {"parallel": parallel(*sizes), "micro_batch": 4, "data.sort_by_length": False})
        for sizes in layouts
    ]
    by_rank = run_ranks(4, call_all, [(receive, (tree,)) for tree in trees])
    for number, sizes in enumerate(layouts):
        compare([results[number] for results in by_rank], trees[number], *sizes)


def compare(results: list[Any], tree: dict[str, Any], tensor: int, pipeline: int) -> None:
    config, data = config_of(tree), 4 // (tensor * pipeline)
    assert sum(reads for _, _, reads, *_ in results) == data and results[0][2]
    for place, stage, _, found, keys, sent in results:
        micro = 4
        loader = build_loader(
            config.data, load_tokenizer(config.tokenizer), global_batch=16, micro_batch=micro, seed=config.seed,
            accumulation=4 // data, rank=place, world_size=data,
        )  # fmt: skip
        wanted = [batch for _, batch in zip(range(2 * 4 // data), loader)]
        mine = [batch for step in found for batch in step]
        assert keys == [batch.keys for batch in wanted]
        small = large = 0
        for got, batch in zip(mine, wanted, strict=True):
            for name in FIELDS[1:]:
                assert torch.equal(got[name], getattr(batch, name)), name
                small += 8 * got[name].numel()
            large += batch.images.numel()
            if stage == 0:
                assert torch.equal(got["images"], batch.images)
            else:
                assert got["images"].shape == (micro, 3, 0, 0)
        ring = (tensor - 1) / tensor * (small + large) if stage == 0 else 0
        assert sent == pytest.approx(ring + (pipeline - 1) / pipeline * small)


def train_and_count(mesh: Mesh, trees: list[dict[str, Any]]) -> list[tuple[str | None, int]]:
    """The error of each run, and how many shards this rank opened in it."""
    from m2_ds.data.row_groups import RowGroups

    found = []
    local = RowGroups._local
    for tree in trees:
        opened: set[int] = set()

        def spied(self: RowGroups, shard: int, store: Any, opened: set[int] = opened) -> Any:
            opened.add(shard)
            return local(self, shard, store)

        RowGroups._local = spied  # type: ignore[method-assign]
        found.append((attempt(mesh, tree), len(opened)))
    RowGroups._local = local  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def runs(
    recipe: dict[str, Any], broken_shapes: Path, deepspeed_files: dict[str, Path], tmp_path_factory: Any
) -> tuple[Path, list[Any]]:
    """Runs on broken pictures, dense and cut; what each rank says of each."""
    folder, trees = tmp_path_factory.mktemp("shared"), []
    for name, sizes in (("dense", (1, 1)), ("tensor", (2, 1)), ("pipeline", (1, 2))):
        for sort in (True, False):
            changes = {
                "folder": str(folder / f"{name}-{sort}"),
                "steps": 3,
                "micro_batch": 4,
                "engine.deepspeed": str(deepspeed_files["zero1"]),
                "parallel": parallel(*sizes),
                "data.sources": [{"path": str(broken_shapes)}],
                "data.sort_by_length": sort,
            }
            trees.append(changed(recipe, changes))
    return folder, run_ranks(2, train_and_count, trees, seconds=150)


def test_numbers_are_those_of_ranks_that_read_for_themselves(runs: tuple[Path, list[Any]]) -> None:
    folder, results = runs
    for rank, each in enumerate(results):
        assert [error for error, _ in each] == [None] * 6, each
        dense, cut = each[:2], each[2:]
        assert all(opened > 0 for _, opened in dense)
        assert all((opened > 0) == (rank == 0) for _, opened in cut)
    wanted = curve(folder / "dense-False")
    for name in ("dense", "tensor", "pipeline"):
        for sort in (True, False):
            found = folder / f"{name}-{sort}"
            torch.testing.assert_close(curve(found), wanted, rtol=1e-5, atol=0)
            lines = log_lines(found)
            assert lines[-1]["skipped"] == log_lines(folder / "dense-False")[-1]["skipped"] != {}
            assert lines[-1]["epochs/shapes"] == 48 / 72
            assert ("sent_mb/batches" in lines[-1]) == (name != "dense")


def fail(mesh: Mesh, tree: dict[str, Any], vanish: str | None) -> str:
    """The error of the third step, after the shards' files were removed by one rank; or that of making the batches."""
    config = config_of(tree)
    here = mesh.with_layout(config.parallel)
    try:
        batches = StepBatches(config, here, load_tokenizer(config.tokenizer), 0)
        next(batches)
        if mesh.is_first and vanish is not None:
            for path in Path(vanish).glob("train/*.parquet"):
                path.unlink()
        for _ in range(20):
            next(batches)
    except Exception as error:
        return f"{'ValueError' if isinstance(error, ValueError) else type(error).__name__}: {error}"
    return "no error"


def test_what_the_reading_rank_cannot_read_stops_all(recipe: dict[str, Any], tmp_path: Path) -> None:
    from m2_ds.data.shards import ShardWriter
    from tests.engine.conftest import record

    calls = []
    for sizes in ((2, 1), (1, 2)):
        folder = tmp_path / f"{sizes[0]}"
        with ShardWriter(folder, "shapes", group_rows=8, shard_bytes=4000) as writer:
            for number in range(64):
                writer.add("train", record(number, "train"))
        tree = changed(
            recipe,
            {
                "parallel": parallel(*sizes),
                "data.sources": [{"path": str(folder)}],
                "data.row_group_cache_mb": 1,
                "data.prefetch": 1,
                "data.shuffle_groups": 1,
            },
        )
        calls.append((fail, (tree, str(folder))))
        calls.append((fail, (changed(tree, {"data.sources": [{"path": str(tmp_path / "none")}]}), None)))
    for rank, errors in enumerate(run_ranks(2, call_all, calls, seconds=100)):
        for lost, none in (errors[:2], errors[2:]):
            assert lost.startswith("ValueError: ") and "parquet" in lost and "missing" in lost, errors
            assert none.startswith("ValueError: ") and "holds no data set" in none
            assert ("the rank that reads" in lost) == (rank == 1) == ("the rank that reads" in none)
