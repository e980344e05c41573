"""Generated scenes: coloured shapes in a relation, with captions in English and Chinese from the same scene graph.

A scene is what a caption claims: two or three kinds of things (number, size, colour, shape) and how they lie. The
picture is drawn from it, so captions are exactly true, and hard negatives, claims with one change, exactly false:

    attribute   the colours of two things swapped        relation   the relation reversed
    size        one thing small instead of large         count      one more or one fewer of a thing

Scene graphs are dealt to the splits by a hash: no graph of val or test is in train. Everything follows from the seed.
"""

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tyro.conf import Positional

from m2_ds.data import randomness
from m2_ds.data.shards import Caption, Dataset, HardNegative, Record, ShardWriter, open_dataset
from m2_ds.data.sources.inspect import show_counts
from m2_ds.data.sources.spread import spread

LANGUAGES = ("en", "zh")
COLOURS = {
    "red": ((214, 39, 40), "红色"),
    "green": ((44, 145, 54), "绿色"),
    "blue": ((31, 90, 200), "蓝色"),
    "yellow": ((245, 208, 30), "黄色"),
    "purple": ((128, 50, 160), "紫色"),
    "orange": ((250, 130, 20), "橙色"),
    "pink": ((245, 140, 185), "粉色"),
    "brown": ((125, 75, 40), "棕色"),
    "black": ((25, 25, 25), "黑色"),
    "grey": ((140, 140, 140), "灰色"),
}
SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "diamond": "菱形",
    "hexagon": "六边形",
    "cross": "十字形",
    "heart": "心形",
}
SIZES = {"small": "小", "large": "大"}
# Half the extent of a thing, as a share of the picture's side.
_RADIUS = {"small": 0.065, "large": 0.125}
RELATIONS = {
    "left": ("to the left of", "左边"),
    "right": ("to the right of", "右边"),
    "above": ("above", "上方"),
    "below": ("below", "下方"),
}
REVERSED = {"left": "right", "right": "left", "above": "below", "below": "above"}
_NUMBERS = {1: ("a", "一个"), 2: ("two", "两个"), 3: ("three", "三个")}
_SPLITS = ("train", "val", "test")
_OVERSAMPLE = 4


@dataclass(frozen=True)
class Things:
    """`count` equal things."""

    count: int
    size: str
    colour: str
    shape: str

    def text(self, language: str) -> str:
        number = _NUMBERS[self.count][LANGUAGES.index(language)]
        if language == "zh":
            return f"{number}{SIZES[self.size]}的{COLOURS[self.colour][1]}{SHAPES[self.shape]}"
        plural = {1: "", 2: "es" if self.shape == "cross" else "s", 3: "es" if self.shape == "cross" else "s"}
        return f"{number} {self.size} {self.colour} {self.shape}{plural[self.count]}"


@dataclass(frozen=True)
class Scene:
    """First lies in `relation` to second; a third, if any, lies in `third_relation` to both."""

    first: Things
    relation: str
    second: Things
    third: Things | None = None
    third_relation: str = ""

    @property
    def things(self) -> tuple[Things, ...]:
        return (self.first, self.second) if self.third is None else (self.first, self.second, self.third)

    def turned(self) -> "Scene":
        """The same scene told from the other side."""
        return replace(self, first=self.second, second=self.first, relation=REVERSED[self.relation])

    def identity(self) -> str:
        """One text for a scene, however it is told."""
        told = self if self.relation in ("left", "above") else self.turned()
        return told.text("en")

    def text(self, language: str) -> str:
        """The caption of the scene as it is told."""
        first, second = self.first.text(language), self.second.text(language)
        if language == "zh":
            text = f"{first}在{second}的{RELATIONS[self.relation][1]}"
            if self.third is not None:
                text += f"，它们的{RELATIONS[self.third_relation][1]}有{self.third.text(language)}"
            return text
        text = f"{first} {RELATIONS[self.relation][0]} {second}"
        if self.third is not None:
            text += f", and {self.third.text(language)} {RELATIONS[self.third_relation][0]} them"
        return text


@dataclass(frozen=True)
class Placed:
    """One thing in the picture. Centre and radius as shares of the side, y downwards; angle in radians."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    angle: float

    @property
    def radius(self) -> float:
        return _RADIUS[self.size]


class _Draws:
    """Random decisions one after another, hashed from the seed and what the decisions are about."""

    def __init__(self, seed: int, *counters: int) -> None:
        self._values = iter(randomness.uniform(seed, randomness.SCENE, *counters, np.arange(64)).tolist())

    def between(self, low: float, high: float) -> float:
        return low + next(self._values) * (high - low)

    def pick(self, options: Sequence[str]) -> str:
        return options[int(next(self._values) * len(options))]

    def distinct(self, options: Sequence[str], count: int) -> list[str]:
        rest = list(options)
        return [rest.pop(int(next(self._values) * len(rest))) for _ in range(count)]


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """The scene graph of one picture: two or three objects, all kinds of things of different shape and colour."""
    for attempt in range(1000):
        draws = _Draws(seed, _SPLITS.index(split), index, attempt)
        kind = draws.pick(("pair", "three", "counted"))
        amount = 3 if kind == "three" else 2
        shapes, colours = draws.distinct(list(SHAPES), amount), draws.distinct(list(COLOURS), amount)
        counts = [1] * amount
        if kind == "counted":
            counts[int(draws.between(0, 2))] = 2
        things = [
            Things(count, draws.pick(list(SIZES)), colour, shape)
            for count, colour, shape in zip(counts, colours, shapes)
        ]
        relation = draws.pick(list(RELATIONS))
        scene = Scene(things[0], relation, things[1])
        if amount == 3:
            # Across the line of the first two, so that it lies on one side of both.
            across = ("above", "below") if relation in ("left", "right") else ("left", "right")
            scene = replace(scene, third=things[2], third_relation=draws.pick(across))
        tenth = int.from_bytes(hashlib.blake2b(scene.identity().encode(), digest_size=4).digest()) % 10
        if {0: "test", 1: "val"}.get(tenth, "train") == split:
            return scene
    raise AssertionError("a thousand graphs in a row belong to other splits")


def place(scene: Scene, draws: _Draws) -> list[Placed]:
    """Where the things of a scene lie. Kinds have a band of the picture each; equal things share theirs, apart."""
    # Along the line of the first two: their bands; across it: the middle, or two thirds if a third kind takes the rest.
    near, far = (0.25, 0.75) if scene.relation in ("left", "above") else (0.75, 0.25)
    if scene.third is None:
        across = [draws.between(0.4, 0.6)] * 2
    else:
        across = [0.7 if scene.third_relation in ("above", "left") else 0.3] * 2
    spots = [(near, across[0]), (far, across[1])]
    if scene.third is not None:
        spots.append((draws.between(0.4, 0.6), 0.22 if scene.third_relation in ("above", "left") else 0.78))
    placed = []
    for things, (along, off) in zip(scene.things, spots):
        for number in range(things.count):
            # Equal things stand across the line, so that all of them lie on the same side of the others.
            apart = 0.0 if things.count == 1 else (number - (things.count - 1) / 2) * 0.36
            shift, across_shift = draws.between(-0.04, 0.04), draws.between(-0.03, 0.03)
            position = (along + shift, off + apart + across_shift)
            x, y = position if scene.relation in ("left", "right") else position[::-1]
            placed.append(Placed(things.size, things.colour, things.shape, x, y, draws.between(-0.2, 0.2)))
    return placed


def holds(scene: Scene, placed: Sequence[Placed]) -> bool:
    """Whether a claim is true of what is in a picture: exact numbers, and relations between whole extents."""
    found = [
        [p for p in placed if (p.size, p.colour, p.shape) == (things.size, things.colour, things.shape)]
        for things in scene.things
    ]
    if any(len(there) != things.count for there, things in zip(found, scene.things)):
        return False
    if len(placed) != sum(things.count for things in scene.things):
        return False
    if scene.third is None:
        return _lies(found[0], scene.relation, found[1])
    return _lies(found[0], scene.relation, found[1]) and _lies(found[2], scene.third_relation, found[0] + found[1])


def _lies(these: Sequence[Placed], relation: str, those: Sequence[Placed]) -> bool:
    if relation in ("right", "below"):
        these, those = those, these
    sideways = relation in ("left", "right")
    ends = [(p.x if sideways else p.y) + p.radius for p in these]
    starts = [(p.x if sideways else p.y) - p.radius for p in those]
    return max(ends) < min(starts)


def negatives(scene: Scene, draws: _Draws) -> dict[str, Scene]:
    """Claims that differ from a scene in one respect, by kind; each is false."""
    first, second = scene.first, scene.second
    swapped = replace(scene, first=replace(first, colour=second.colour), second=replace(second, colour=first.colour))
    which = draws.pick(("first", "second"))
    other_size = replace(getattr(scene, which), size={"small": "large", "large": "small"}[getattr(scene, which).size])
    which_count = draws.pick(("first", "second"))
    counted = getattr(scene, which_count)
    other_count = replace(counted, count=2 if counted.count == 1 else int(draws.pick("13")))
    return {
        "attribute": swapped,
        "relation": replace(scene, relation=REVERSED[scene.relation]),
        "size": replace(scene, **{which: other_size}),
        "count": replace(scene, **{which_count: other_count}),
    }


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corner points in the unit circle, y downwards."""

    def ring(corners: int, radius: float = 1.0, turn: float = -math.pi / 2) -> list[tuple[float, float]]:
        angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
        return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]

    if shape == "square":
        return ring(4, 1.0, math.pi / 4)
    if shape == "diamond":
        return [(0.6 * x, y) for x, y in ring(4)]
    if shape == "star":
        inner = ring(5, 0.4, -math.pi / 2 + math.pi / 5)
        return [point for pair in zip(ring(5), inner) for point in pair]
    if shape == "cross":
        w = 0.32
        quarter = [(w, -0.94), (w, -w), (0.94, -w)]
        turns = [lambda x, y: (x, y), lambda x, y: (-y, x), lambda x, y: (-x, -y), lambda x, y: (y, -x)]
        return [turn(x, y) for turn in turns for x, y in quarter]
    if shape == "heart":
        curve = [2 * math.pi * k / 48 for k in range(48)]
        return [
            (
                16 * math.sin(t) ** 3 / 17,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
            )
            for t in curve
        ]
    return ring({"triangle": 3, "hexagon": 6, "circle": 64}[shape])


def draw(placed: Sequence[Placed], background: tuple[int, int, int], size: int) -> Image.Image:
    """The picture, `size` pixels a side, smooth at the edges."""
    side = size * _OVERSAMPLE
    picture = Image.new("RGB", (side, side), background)
    canvas = ImageDraw.Draw(picture)
    for thing in placed:
        cos, sin = math.cos(thing.angle), math.sin(thing.angle)
        points = [
            (
                side * (thing.x + thing.radius * (cos * x - sin * y)),
                side * (thing.y + thing.radius * (sin * x + cos * y)),
            )
            for x, y in _outline(thing.shape)
        ]
        canvas.polygon(points, fill=COLOURS[thing.colour][0])
    return picture.reduce(_OVERSAMPLE)


def make_record(place_of: tuple[str, int], *, size: int, seed: int) -> Record:
    """The picture (split, index), captions told from both sides, and a hard negative of each kind."""
    split, index = place_of
    scene = draw_scene(seed, split, index)
    draws = _Draws(seed, 1000 + _SPLITS.index(split), index)
    level = int(draws.between(215, 256))
    background = tuple(min(255, level + int(draws.between(-8, 9))) for _ in range(3))
    placed = place(scene, draws)
    out = io.BytesIO()
    draw(placed, (background[0], background[1], background[2]), size).save(out, "PNG")
    wrong = negatives(scene, draws)
    return Record(
        key=f"scenes/{split}/{index:07d}",
        image=out.getvalue(),
        captions=[
            Caption(told.text(language), language, 1.0, "scene")
            for language in LANGUAGES
            for told in (scene, scene.turned())
        ],
        hard_negatives=[
            HardNegative(claim.text(language), language, kind)
            for kind, claim in wrong.items()
            for language in LANGUAGES
        ],
        group=scene.identity(),
        category="side by side" if scene.relation in ("left", "right") else "one above the other",
        source="scenes",
        license="CC0-1.0",
        width=size,
        height=size,
    )


def build(
    out: Positional[Path],
    *,
    train: int = 10_000,
    val: int = 1_000,
    test: int = 1_000,
    size: int = 128,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> Dataset:
    """Generate scenes and write the shards. A folder that holds the same set already is left as it is.

    Args:
        out: folder of the data set.
        train: pictures of the training split; the others are likewise.
        val: pictures to choose settings on.
        test: pictures for final numbers.
        size: side of the pictures, pixels.
        seed: everything follows from it.
        workers: processes that draw; by default one a core.
        overwrite: generate again although the folder holds a data set.

    Raises:
        ValueError: a size or number that makes no sense; a folder that holds something else.
    """
    asked = {split: number for split, number in zip(_SPLITS, (train, val, test)) if number}
    if min(train, val, test) < 0 or not asked or size < 16:
        raise ValueError(
            f"train {train}, val {val}, test {test}, size {size}: some pictures of 16 pixels or more, please"
        )
    name = f"scenes-{size}px-seed{seed}"
    if (out / "manifest.json").exists() and not overwrite:
        dataset = open_dataset(out)
        there = {split: info.rows for split, info in dataset.manifest.splits.items()}
        if dataset.name != name or there != asked:
            raise ValueError(
                f"{out} holds {dataset.name} {there}, not {name} {asked}; choose another folder or overwrite it"
            )
        show_counts(dataset)
        return dataset
    with ShardWriter(out, name, overwrite=overwrite) as writer:
        places = [(split, index) for split, number in asked.items() for index in range(number)]
        drawn = spread(partial(make_record, size=size, seed=seed), places, "drawing scenes", workers=workers, chunk=64)
        for (split, _), record in zip(places, drawn):
            writer.add(split, record)
    dataset = open_dataset(out)
    show_counts(dataset)
    return dataset
