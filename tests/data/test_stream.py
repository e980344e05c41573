"""The stream: equal for any ranks, workers, restarts; captions by weight; broken pairs replaced in place."""

import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2_ds.data.config import DataConfig, SourceConfig
from m2_ds.data.records import Caption, Record
from m2_ds.data.stream import PairBatch, PairDataset, build_loader, group_id
from tests.support.pairs import ByteTokenizer, encoded, make_dataset, picture, text_of

LIVELY = {
    "crop_scale": (0.5, 1.0),
    "flip": 0.5,
    "degrees": 10.0,
    "brightness": 0.2,
    "contrast": 0.2,
    "erase": 0.3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    make_dataset(folder / "a", 90, name="a")
    make_dataset(folder / "b", 35, name="b")
    return folder


def config(folder: Path, **changes: Any) -> DataConfig:
    sources = [SourceConfig(path=folder / "a", weight=3), SourceConfig(path=folder / "b", weight=1)]
    base = {"sources": sources, "image_size": 16, "mixing_window": 32, "shuffle_groups": 3, "augment": LIVELY}
    return DataConfig.model_validate(base | {"captions": "each"} | changes)


def batches(config: DataConfig, steps: int, **options: Any) -> list[PairBatch]:
    sizes = {"global_batch": 8, "micro_batch": 8, "seed": 5} | options
    return list(islice(build_loader(config, ByteTokenizer(), **sizes), steps))


def rows(batch: PairBatch) -> list[tuple[Any, ...]]:
    """One comparable tuple a pair, whatever batch it came in."""
    return [
        (
            batch.slot[b].item(),
            batch.keys[b],
            batch.group[b].item(),
            batch.images[b].numpy().tobytes(),
            *(batch.language[:, b].tolist()),
            *(text_of(batch.ids[c, b]) for c in range(len(batch.ids))),
        )
        for b in range(len(batch.slot))
    ]


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[list[tuple[Any, ...]]]:
    """Six steps as one rank without workers sees them."""
    return [rows(batch) for batch in batches(config(folder), 6)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_and_micro_batches_cut_the_same_global_batch(
    folder: Path, reference: list[list[tuple[Any, ...]]], world_size: int, accumulation: int
) -> None:
    micro = 8 // world_size // accumulation
    for start in (0, 3):
        parts = [
            batches(
                config(folder),
                3 * accumulation,
                micro_batch=micro,
                rank=rank,
                world_size=world_size,
                accumulation=accumulation,
                start_sample=8 * start,
            )
            for rank in range(world_size)
        ]
        for step in range(3):
            mine = slice(step * accumulation, (step + 1) * accumulation)
            assert [row for part in parts for batch in part[mine] for row in rows(batch)] == reference[start + step]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(folder: Path, reference: list[list[tuple[Any, ...]]], workers: int) -> None:
    assert [rows(batch) for batch in batches(config(folder, workers=workers), 6)] == reference
    later = batches(config(folder, workers=workers), 2, start_sample=32)
    assert [rows(batch) for batch in later] == reference[4:]


def test_caches_change_nothing(folder: Path, reference: list[list[tuple[Any, ...]]]) -> None:
    for change in ({"picture_cache_mb": 64}, {"row_group_cache_mb": 1, "prefetch": 1}):
        assert [rows(batch) for batch in batches(config(folder, **change), 6)] == reference


def test_another_seed_is_another_stream(folder: Path, reference: list[list[tuple[Any, ...]]]) -> None:
    other = [rows(batch) for batch in batches(config(folder), 6, seed=6)]
    assert [row[1] for step in other for row in step] != [row[1] for step in reference for row in step]


def test_shapes_and_contents(folder: Path) -> None:
    (batch,) = batches(config(folder), 1)
    length = max(len(text.encode()) for b in range(8) for c in range(2) for text in [text_of(batch.ids[c, b])])
    assert batch.images.shape == (8, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.ids.shape == batch.mask.shape == (2, 8, length)
    assert batch.language.tolist() == [[0] * 8, [1] * 8]
    assert batch.slot.tolist() == list(range(8))
    assert batch.skipped == {}
    for b, key in enumerate(batch.keys):
        name, number = key.split("/")
        assert batch.group[b] == group_id(name, f"group {int(number) // 2}")
        assert text_of(batch.ids[1, b]) == f"{name} 第{number}"
        assert text_of(batch.ids[0, b]) in (f"{name} {number}", f"{name} number {number}")
    moved = batch.to("cpu")
    assert torch.equal(moved.ids, batch.ids)


def test_weights_and_epochs_hold_in_the_stream(folder: Path) -> None:
    keys = [key for batch in batches(config(folder), 20) for key in batch.keys]
    for window in range(5):
        assert Counter(key[0] for key in keys[32 * window : 32 * window + 32]) == {"a": 24, "b": 8}
    assert len(set([key for key in keys if key[0] == "a"][:90])) == 90
    assert len(set([key for key in keys if key[0] == "b"][:35])) == 35


def test_without_weights_sources_mix_by_their_rows(folder: Path) -> None:
    sources = [SourceConfig(path=folder / name) for name in "ab"]
    keys = [key for batch in batches(config(folder, sources=sources, mixing_window=125), 16) for key in batch.keys]
    assert len(set(keys[:125])) == 125
    with pytest.raises(ValueError, match="every source a weight, or none"):
        config(folder, sources=[sources[0], SourceConfig(path=folder / "b", weight=1)])


def test_languages_and_captions_are_drawn_by_weight(folder: Path) -> None:
    drawn = config(folder, captions="one", languages={"en": 3.0, "zh": 1.0})
    found = batches(drawn, 250)
    language = torch.cat([batch.language[0] for batch in found])
    assert language.float().mean().item() == pytest.approx(0.25, abs=0.04)
    texts = [text_of(batch.ids[0, b]) for batch in found for b in range(8) if batch.language[0, b] == 0]
    share = np.mean(["number" in text for text in texts])
    assert share == pytest.approx(0.2, abs=0.04)  # weight 0.25 against 1
    again = batches(drawn, 250)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, again))


def test_caption_kinds_can_be_left_out(folder: Path) -> None:
    sources = [SourceConfig(path=folder / "a", caption_kinds={"keywords": 0.0})]
    texts = [text_of(batch.ids[0, b]) for batch in batches(config(folder, sources=sources), 20) for b in range(8)]
    assert not [text for text in texts if "number" in text]
    with pytest.raises(ValueError, match="negative"):
        SourceConfig(path=folder, caption_kinds={"keywords": -1.0})


BROKEN = {3: "cut", 17: "cut", 20: "zh only", 41: "blank"}


def _damaged(number: int, made: Record) -> Record:
    match BROKEN.get(number):
        case "cut":
            return replace(made, image=made.image[:50])
        case "zh only":
            return replace(made, captions=made.captions[2:])
        case "blank":
            return replace(made, captions=[Caption("x", "en", 1.0, "other"), made.captions[2]])
    return made


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    make_dataset(folder / "whole", 60)
    make_dataset(folder / "damaged", 60, change=_damaged)
    return folder


def _epoch(folder: Path, **changes: Any) -> list[PairBatch]:
    changes = {"sources": [SourceConfig(path=folder, caption_kinds={"other": 0.0})]} | changes
    return batches(config(folder, **changes), 15, global_batch=4, micro_batch=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pairs_are_replaced_counted_and_move_nobody(damaged: Path, workers: int) -> None:
    whole = [row for batch in _epoch(damaged / "whole") for row in rows(batch)]
    found = _epoch(damaged / "damaged", workers=workers)
    result = [row for batch in found for row in rows(batch)]
    bad = {f"pair/{number}" for number in BROKEN}
    for before, after in zip(whole, result):
        assert (after == before) == (before[1] not in bad)
        assert after[0] == before[0]
        assert after[1] not in bad
    skipped: Counter[str] = Counter()
    for batch in found:
        skipped.update(batch.skipped)
    assert skipped["broken picture"] >= 2
    assert skipped["no caption"] >= 2
    counted = [sum(batch.skipped.values()) for batch in found]
    places = [sum(key in bad for _, key, *_ in whole[4 * k : 4 * k + 4]) for k in range(15)]
    assert all((count > 0) == (place > 0) for count, place in zip(counted, places))


def test_one_language_is_enough_when_one_is_drawn(damaged: Path) -> None:
    found = _epoch(damaged / "damaged", captions="one")
    keys = {key: text_of(batch.ids[0, b]) for batch in found for b, key in enumerate(batch.keys)}
    assert keys["pair/20"] == "pair 第20"
    assert sum(batch.skipped.get("no caption", 0) for batch in found) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_hopeless_set_stops_with_names_and_reasons(tmp_path: Path, workers: int) -> None:
    make_dataset(tmp_path, 20, change=lambda _, made: replace(made, image=b"gone"))
    with pytest.raises(ValueError, match=r"(?s)3 tries.*pair/\d+ in .*train-0000\d\.parquet: broken picture"):
        batches(config(tmp_path, sources=[SourceConfig(path=tmp_path)], max_attempts=2, workers=workers), 1)


def test_too_large_pictures_are_counted_as_such(tmp_path: Path) -> None:
    def grow(number: int, made: Record) -> Record:
        return replace(made, image=encoded(picture(number, 40))) if number % 2 else made

    make_dataset(tmp_path, 20, change=grow)
    found = batches(config(tmp_path, sources=[SourceConfig(path=tmp_path)], max_pixels=1000), 2)
    assert sum(batch.skipped["picture too large"] for batch in found) > 0


def test_sources_without_the_languages_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sources\.0.*captions in \['en', 'zh'\].*\['de'\] are asked for"):
        batches(config(folder, languages={"de": 1.0}), 1)
    with pytest.raises(ValueError, match=r"must all be there for captions: each"):
        batches(config(folder, languages={"de": 1.0, "en": 1.0}), 1)
    with pytest.raises(ValueError, match="holds no data set"):
        batches(config(tmp_path), 1)


def test_sizes_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="global_batch 8 is not micro_batch 3 x accumulation 1 x 2 ranks"):
        build_loader(config(folder), ByteTokenizer(), global_batch=8, micro_batch=3, seed=0, world_size=2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        build_loader(config(folder), ByteTokenizer(), global_batch=8, micro_batch=4, seed=0, world_size=2, rank=2)


def test_a_full_picture_cache_keeps_what_it_has_and_no_more(folder: Path) -> None:
    dataset = PairDataset(config(folder, picture_cache_mb=1), ByteTokenizer(), seed=5)
    dataset._room = 5 * 12 * 12 * 3
    before = dataset.__getitems__(list(range(40)))
    assert len(dataset._pictures) == 5
    assert dataset._room == 0
    assert rows(dataset.__getitems__(list(range(40)))[0]) == rows(before[0])


def test_the_loader_thread_ends_with_its_iterator(folder: Path) -> None:
    import threading

    iterator = iter(build_loader(config(folder), ByteTokenizer(), global_batch=8, micro_batch=8, seed=0))
    next(iterator)
    assert [t for t in threading.enumerate() if t.name == "m2-loader"]
    iterator.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "m2-loader"]


def test_workers_start_soon(folder: Path) -> None:
    start = time.monotonic()
    batches(config(folder, workers=2), 1)
    assert time.monotonic() - start < 20


def test_groups_of_different_sets_are_different_and_their_numbers_fixed() -> None:
    assert group_id("a", "x") != group_id("b", "x")
    assert group_id("a", "x") == 196617287793225106
    assert max(group_id("a", str(k)) for k in range(1000)) < 2**63


def test_substitutes_come_from_all_over_the_source(tmp_path: Path) -> None:
    make_dataset(tmp_path, 60, change=lambda number, made: replace(made, image=b"x") if number < 30 else made)
    found = batches(config(tmp_path, sources=[SourceConfig(path=tmp_path)]), 30)
    keys = Counter(key for batch in found for key in batch.keys)
    assert len(keys) == 30
    assert max(keys.values()) < 24  # 240 pairs over 30 usable rows: 8 each on average
