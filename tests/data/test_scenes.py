"""Scenes: equal from run to run, true captions, false negatives, and pictures that show what is claimed."""

import io
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2_ds.data.shards import open_dataset
from m2_ds.data.sources import scenes
from m2_ds.data.sources.scenes import COLOURS, SHAPES, Placed, Scene, Things

places = st.tuples(st.integers(0, 3), st.sampled_from(scenes._SPLITS), st.integers(0, 100_000))


def parts(place: tuple[int, str, int]) -> tuple[Scene, list[Placed], dict[str, Scene]]:
    seed, split, index = place
    scene = scenes.draw_scene(seed, split, index)
    draws = scenes._Draws(seed, 99, index)
    return scene, scenes.place(scene, draws), scenes.negatives(scene, draws)


@settings(max_examples=300, deadline=None)
@given(places)
def test_captions_are_true_and_negatives_false(place: tuple[int, str, int]) -> None:
    scene, placed, wrong = parts(place)
    assert scenes.holds(scene, placed)
    assert scenes.holds(scene.turned(), placed)
    assert list(wrong) == ["attribute", "relation", "size", "count"]
    for kind, claim in wrong.items():
        assert not scenes.holds(claim, placed), kind
        for language in scenes.LANGUAGES:
            assert claim.text(language) not in (scene.text(language), scene.turned().text(language))
        assert claim.identity() != scene.identity()


@settings(max_examples=200, deadline=None)
@given(places)
def test_negatives_change_what_they_say(place: tuple[int, str, int]) -> None:
    scene, _, wrong = parts(place)

    def values(claim: Scene, field: str) -> list[object]:
        return [getattr(things, field) for things in claim.things]

    for kind, field in (("size", "size"), ("count", "count")):
        changed = [a != b for a, b in zip(values(scene, field), values(wrong[kind], field))]
        assert sum(changed) == 1
        assert all(
            values(scene, f) == values(wrong[kind], f) for f in ("size", "count", "colour", "shape") if f != field
        )
        assert wrong[kind].relation == scene.relation
    assert sorted(values(wrong["attribute"], "colour")) == sorted(values(scene, "colour"))
    assert values(wrong["attribute"], "colour") != values(scene, "colour")
    assert wrong["relation"].relation != scene.relation
    assert wrong["relation"].things == scene.things


@settings(max_examples=200, deadline=None)
@given(places)
def test_things_lie_apart_and_inside(place: tuple[int, str, int]) -> None:
    _, placed, _ = parts(place)
    assert 2 <= len(placed) <= 3
    for thing in placed:
        assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
    for a, b in combinations(placed, 2):
        assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("size", ["small", "large"])
def test_the_picture_shows_each_thing_in_its_place_and_colour(shape: str, size: str) -> None:
    for number, colour in enumerate(COLOURS):
        thing = Placed(size, colour, shape, 0.3 + 0.04 * number, 0.6, 0.1)
        pixels = np.asarray(scenes.draw([thing], (240, 240, 240), 128)).astype(int)
        there = np.abs(pixels - np.array(COLOURS[colour][0])).sum(-1) < 12
        y, x = (there.nonzero()[k].mean() / 128 for k in (0, 1))
        assert abs(x - thing.x) < 0.02
        assert abs(y - thing.y) < 0.03
        area = there.sum() / 128**2 / (np.pi * thing.radius**2)
        assert 0.2 < area <= 1.0


def test_sizes_are_told_apart_by_area() -> None:
    areas = {}
    for size in ("small", "large"):
        picture = scenes.draw([Placed(size, "red", "circle", 0.5, 0.5, 0)], (255, 255, 255), 128)
        areas[size] = (np.asarray(picture)[..., 1] < 128).sum()
    assert areas["large"] > 3 * areas["small"]


def test_texts() -> None:
    two = Scene(Things(2, "small", "red", "cross"), "left", Things(1, "large", "blue", "star"))
    assert two.text("en") == "two small red crosses to the left of a large blue star"
    assert two.text("zh") == "两个小的红色十字形在一个大的蓝色五角星的左边"
    assert two.turned().text("en") == "a large blue star to the right of two small red crosses"
    assert two.identity() == two.turned().identity()
    three = Scene(*([two.first, "above", two.second]), Things(1, "small", "pink", "heart"), "right")
    assert three.text("en").endswith(", and a small pink heart to the right of them")
    assert three.text("zh").endswith("，它们的右边有一个小的粉色心形")


def test_holds_is_strict() -> None:
    red = Placed("small", "red", "circle", 0.2, 0.5, 0)
    blue = Placed("small", "blue", "star", 0.8, 0.5, 0)
    scene = Scene(Things(1, "small", "red", "circle"), "left", Things(1, "small", "blue", "star"))
    assert scenes.holds(scene, [red, blue])
    assert not scenes.holds(scene, [red, blue, red])
    assert not scenes.holds(scene, [red])
    assert not scenes.holds(scene, [red, Placed("small", "blue", "star", 0.25, 0.5, 0)])
    above = Scene(scene.first, "above", scene.second)
    assert not scenes.holds(above, [red, blue])


def test_a_data_set_is_equal_from_run_to_run_and_in_any_number_of_processes(tmp_path: Path) -> None:
    content = []
    for name, workers in (("one", 1), ("two", 2)):
        scenes.build(tmp_path / name, train=130, val=20, test=10, size=32, seed=4, workers=workers)
        content.append([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.parquet"))])
    assert content[0] == content[1]
    dataset = open_dataset(tmp_path / "one")
    assert {name: info.rows for name, info in dataset.manifest.splits.items()} == {"train": 130, "val": 20, "test": 10}
    groups = {name: {row["group"] for row in dataset.split(name).iter(["group"])} for name in dataset.splits}
    assert not groups["train"] & (groups["val"] | groups["test"])
    assert not groups["val"] & groups["test"]
    record = dataset.split("train").read([0])[0]
    assert [(c.language, c.kind) for c in record.captions] == [("en", "scene")] * 2 + [("zh", "scene")] * 2
    assert [n.kind for n in record.hard_negatives] == [
        k for k in ("attribute", "relation", "size", "count") for _ in "ab"
    ]
    assert Image.open(io.BytesIO(record.image)).size == (32, 32)
    scenes.build(tmp_path / "other", train=10, val=0, test=0, size=32, seed=5, workers=1)
    assert open_dataset(tmp_path / "other").split("train").read([0])[0].captions != record.captions


def test_no_graph_is_in_two_splits() -> None:
    graphs = {split: {scenes.draw_scene(0, split, k).identity() for k in range(2000)} for split in scenes._SPLITS}
    for one, other in combinations(graphs.values(), 2):
        assert not one & other


def test_what_is_there_is_kept_and_something_else_refused(tmp_path: Path) -> None:
    scenes.build(tmp_path, train=5, val=0, test=0, size=32, workers=1)
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    scenes.build(tmp_path, train=5, val=0, test=0, size=32, workers=1)
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="scenes-32px-seed0.*'train': 5.*'train': 6"):
        scenes.build(tmp_path, train=6, val=0, test=0, size=32, workers=1)
    scenes.build(tmp_path, train=6, val=0, test=0, size=32, workers=1, overwrite=True)
    assert len(open_dataset(tmp_path).split("train")) == 6
    with pytest.raises(ValueError, match="size 8"):
        scenes.build(tmp_path, size=8)
