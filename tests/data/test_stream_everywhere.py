"""The stream as properties: any ranks, any workers, any break, any later layout: the same pairs, once each."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2_ds.data.config import DataConfig
from m2_ds.data.stream import PairBatch, build_loader
from tests.support.pairs import ByteTokenizer, make_dataset

SEED, BATCH, STEPS = 7, 16, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everywhere")
    make_dataset(folder / "a", 150, name="a")
    make_dataset(folder / "b", 41, name="b")
    return folder


def config(folder: Path, **changes: Any) -> DataConfig:
    sources = [{"path": folder / "a", "weight": 3}, {"path": folder / "b", "weight": 1, "languages": {"zh": 1}}]
    base = {"sources": sources, "image_size": 8, "mixing_window": 32, "shuffle_groups": 3, "prefetch": 2}
    return DataConfig.model_validate(base | {"augment": {"crop_scale": [0.5, 1.0], "flip": 0.5}} | changes)


def loaders(config: DataConfig, ranks: int, batch: int, accumulation: int = 1, start: int = 0) -> list[Any]:
    return [
        build_loader(
            config, ByteTokenizer(), global_batch=batch, micro_batch=batch // ranks // accumulation,
            accumulation=accumulation, seed=SEED, start_sample=start, rank=rank, world_size=ranks,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def told(batch: PairBatch) -> Iterator[tuple[Any, ...]]:
    """Everything about each pair; captions without their padding, which depends on the company."""
    for b in range(len(batch.slot)):
        ids = batch.ids[:, b][batch.mask[:, b] > 0].tolist()
        yield (
            batch.slot[b].item(), batch.keys[b], batch.language[:, b].tolist(), ids, batch.group[b].item(),
            batch.images[b].numpy().tobytes(),
        )  # fmt: skip


def pairs(loaders: list[Any], steps: int, accumulation: int = 1) -> list[tuple[Any, ...]]:
    """Global batches one after another, as their ranks hand them over."""
    parts = [list(islice(loader, steps * accumulation)) for loader in loaders]
    return [
        pair
        for step in range(steps)
        for part in parts
        for batch in part[step * accumulation : (step + 1) * accumulation]
        for pair in told(batch)
    ]


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[tuple[Any, ...]]:
    return pairs(loaders(config(folder), 1, BATCH), 20)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks(folder: Path, reference: list[tuple[Any, ...]], ranks: int, accumulation: int) -> None:
    found = pairs(loaders(config(folder), ranks, BATCH, accumulation), STEPS, accumulation)
    assert found == reference[: STEPS * BATCH]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(2, 1), (1, 4), *(pytest.param(r, w, marks=pytest.mark.slow) for r in (1, 2, 4, 8) for w in (1, 2, 3, 4))],
)
def test_workers(folder: Path, reference: list[tuple[Any, ...]], ranks: int, workers: int) -> None:
    found = pairs(loaders(config(folder, workers=workers), ranks, BATCH), STEPS)
    assert found == reference[: STEPS * BATCH]


def test_workers_and_urls_and_a_break(folder: Path, reference: list[tuple[Any, ...]], tmp_path: Path) -> None:
    sources = [
        {"path": f"file://{folder / 'a'}", "weight": 3},
        {"path": f"file://{folder / 'b'}", "weight": 1, "languages": {"zh": 1}},
    ]
    there = config(folder, sources=sources, workers=2, cache_folder=tmp_path, cache_gb=1e-5)
    assert pairs(loaders(there, 1, BATCH, start=48), STEPS) == reference[48 : 48 + STEPS * BATCH]


def test_any_chain_of_breaks_layouts_and_global_batches_sees_each_pair_once_in_order(
    folder: Path, reference: list[tuple[Any, ...]]
) -> None:
    """Twenty breaks at random points; each part goes on with other ranks, micro-batches and another global batch.

    A part reads ahead as far as it likes, and is dropped: what counts is the number of pairs that were trained on.
    """
    draw = np.random.default_rng(0)
    for chain in range(4):
        seen: list[tuple[Any, ...]] = []
        for _ in range(5):
            ranks, accumulation = int(draw.choice([1, 2, 4, 8])), int(draw.choice([1, 2]))
            batch = ranks * accumulation * int(draw.integers(1, 4))
            steps = int(draw.integers(0, 4))
            seen += pairs(loaders(config(folder), ranks, batch, accumulation, start=len(seen)), steps, accumulation)
        assert [pair[0] for pair in seen] == list(range(len(seen))), chain
        assert seen == reference[: len(seen)], chain


@pytest.mark.parametrize(("ranks", "batch"), [(1, 10), (2, 22), (4, 12)])
def test_epochs_hold_through_any_layout(folder: Path, ranks: int, batch: int) -> None:
    """Each row of each source once an epoch, and as often as the count of epochs says."""
    found: list[str] = []
    made = loaders(config(folder), ranks, batch)
    steps = 900 // batch
    for step in zip(*(islice(loader, steps) for loader in made)):
        found += [key for part in step for key in part.keys]
    epochs = made[0].dataset.epochs(len(found))
    for name, rows in (("a", 150), ("b", 41)):
        mine = [key for key in found if key.startswith(f"{name}/")]
        assert len(mine) / rows == epochs[name]
        for epoch in range(len(mine) // rows):
            assert len(set(mine[epoch * rows : (epoch + 1) * rows])) == rows
        counts = Counter(mine).values()
        assert max(counts) - min(counts) <= 1
