"""Raw pairs with planted defects, as webdataset tars: each at a known rate, one a record, and the truth beside.

Pictures are those of data sets of this project, varied so that none repeats another: turned, recoloured, on coloured
ground, in other sizes. A record is a function of its number, so any number of processes makes the same tars.
"""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image

from m2_ds.data.shards import Caption, Record, ShardWriter, open_dataset

# Rule -> share of records that it has to take. What is not here is clean.
RATES = {
    "short_caption": 0.01, "long_caption": 0.005, "no_letters": 0.005, "repetition": 0.005, "boilerplate": 0.01,
    "language": 0.01, "no_caption": 0.005, "bad_fields": 0.003, "unsafe": 0.01,
    "empty_picture": 0.005, "broken_picture": 0.01, "too_many_pixels": 0.001, "format": 0.003, "animated": 0.003,
    "aspect_ratio": 0.01, "too_small": 0.01, "single_colour": 0.005,
    "evaluation_picture": 0.005, "evaluation_near_picture": 0.005,
    "duplicate_picture": 0.02, "near_duplicate_picture": 0.02, "repeated_caption": 0.01,
    # Defects that are to be mended, not dropped: the record stays, its caption is clean afterwards.
    "(markup)": 0.01, "(unicode)": 0.01,
}  # fmt: skip
EVALUATION = 500  # pictures of the evaluation set
REPEATS = 100  # copies of one caption that stay
_SPAM = (
    "Download this free stock photo for your next creative project today",
    "正版高清图片免费下载，海量素材任你挑选，欢迎光临本站",
)
_FOREIGN = (
    "Ein kleiner roter Vogel sitzt auf dem Zweig eines alten Baumes im Garten",
    "Une petite maison blanche au bord de la mer avec un grand jardin fleuri",
    "Un perro marrón corre por la playa mientras los niños juegan con la pelota",
    "маленький красный дом стоит на берегу большого озера",
    "赤い帽子をかぶった女の子が公園で遊んでいます",
    "빨간 모자를 쓴 아이가 공원에서 놀고 있어요",
    "Mały czerwony dom stoi nad brzegiem dużego jeziora w górach",
)
_COLOURS = ["red", "orange", "yellow", "green", "teal", "blue", "violet", "pink", "brown", "grey", "black", "white"]
_FARBEN = ["红", "橙", "黄", "绿", "青", "蓝", "紫", "粉", "棕", "灰", "黑", "白"]
_PLACES = [
    "kitchen",
    "harbour",
    "market",
    "forest",
    "museum",
    "station",
    "garden",
    "valley",
    "temple",
    "bridge",
    "studio",
    "desert",
]
_ORTE = ["厨房", "港口", "市场", "森林", "博物馆", "车站", "花园", "山谷", "寺庙", "桥边", "工作室", "沙漠"]


class Maker:
    """Records by number."""

    def __init__(self, sets: Sequence[Path], seed: int = 0) -> None:
        self.seed = seed
        self.bases: list[Record] = []
        for folder in sets:
            split = open_dataset(folder).split("train")
            self.bases += split.read(range(len(split)))
        self.kinds = list(RATES)
        self.edges = np.cumsum([RATES[kind] for kind in self.kinds])

    def kind(self, number: int) -> str:
        """What is wrong with a record; "" for nothing. The first hundred are clean, so that copies have originals."""
        draw = np.random.default_rng([self.seed, 1, number]).random()
        place = int(np.searchsorted(self.edges, draw, side="right"))
        return self.kinds[place] if place < len(self.kinds) and number >= 100 else ""

    def clean_picture(self, number: int) -> Image.Image:
        """A base picture turned, with other colours, somewhere on another ground."""
        draw = np.random.default_rng([self.seed, 2, number])
        base = self.bases[int(draw.integers(len(self.bases)))]
        picture = Image.open(io.BytesIO(base.image)).convert("RGB")
        pixels = np.asarray(picture)
        ground = draw.integers(0, 256, 3, dtype=np.uint8)
        white = (pixels > 243).all(axis=2, keepdims=True)
        pixels = np.where(white, ground, pixels[..., draw.permutation(3)])
        turned = Image.fromarray(pixels).transpose(Image.Transpose(int(draw.integers(7))))
        width, height = (int(side) for side in draw.integers(96, 168, 2))
        side = int(draw.integers(64, min(width, height) + 1))
        canvas = Image.new("RGB", (width, height), tuple(ground.tolist()))
        place = (int(draw.integers(width - side + 1)), int(draw.integers(height - side + 1)))
        canvas.paste(turned.resize((side, side), Image.Resampling.BILINEAR), place)
        return canvas

    def clean_caption(self, number: int) -> str:
        draw = np.random.default_rng([self.seed, 2, number])
        base = self.bases[int(draw.integers(len(self.bases)))]
        draw = np.random.default_rng([self.seed, 3, number])
        language = ("en", "zh")[int(draw.integers(2))]
        text = next(caption.text for caption in base.captions if caption.language == language)
        colour, place = int(draw.integers(12)), int(draw.integers(12))
        if language == "en":
            return f"{text}, {_COLOURS[colour]} ground, near the {_PLACES[place]} of picture book {number % 9973}"
        return f"{_ORTE[place]}旁边的{text}，背景是{_FARBEN[colour]}色，第{number % 9973}页"

    def original(self, number: int) -> int:
        """A clean record before this one, for copies."""
        draw = np.random.default_rng([self.seed, 4, number])
        while self.kind(found := int(draw.integers(number))) != "":
            pass
        return found

    def record(self, number: int) -> tuple[str, dict[str, bytes]]:
        """(what is wrong, files of the record in the tar)."""
        kind = self.kind(number)
        text: str | None = self.clean_caption(number)
        fields: dict[str, Any] = {"punsafe": 0.1}
        picture = b""
        if kind in _TEXTS:
            text = _TEXTS[kind](text or "", number)
        if kind in _PICTURES:
            picture = _PICTURES[kind](self, number)
        else:
            picture = jpeg(self.clean_picture(number), 85)
        if kind == "unsafe":
            fields["punsafe"] = 0.9
        files = {"jpg": picture, "json": json.dumps(fields | {"caption": text}).encode()}
        if kind == "no_caption":
            files["json"] = json.dumps(fields).encode()
        elif kind == "bad_fields":
            files["json"] = b'{"caption": "cut o'
        return kind, files


def jpeg(picture: Image.Image, quality: int, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **({"quality": quality} if kind == "JPEG" else {}), **options)
    return out.getvalue()


def _near(maker: Maker, number: int) -> bytes:
    """A picture at three quarters of its size, in another format."""
    original = Image.open(io.BytesIO(jpeg(maker.clean_picture(maker.original(number)), 85)))
    return _smaller(original, number)


def _smaller(picture: Image.Image, number: int) -> bytes:
    small = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.Resampling.BICUBIC)
    return jpeg(small, 80) if number % 2 else jpeg(small, 0, "PNG")


_TEXTS: dict[str, Callable[[str, int], str]] = {
    "short_caption": lambda text, number: ("cat", "一只猫", "a b", "好看")[number % 4],
    "long_caption": lambda text, number: " ".join([text, *(f"{(number + 1) * i:x}" for i in range(1000, 1300))]),
    "no_letters": lambda text, number: ("12:30 -- 14:45 !!", "★★★★★ 2024/05/06", "??? ... !!!")[number % 3],
    "repetition": lambda text, number: ("wooooooooooooow nice", "buy now " * 9, "哈哈哈哈哈哈哈哈哈哈哈哈")[number % 3],
    "boilerplate": lambda text, number: (
        f"IMG_{number}.jpg",
        "Click here to enlarge image",
        "点击查看大图",
        f"DSC{number}",
    )[number % 4],
    "language": lambda text, number: _FOREIGN[number % len(_FOREIGN)],
    "repeated_caption": lambda text, number: f"{_SPAM[number % 2]}{'!' * (number % 3)}",
    "(markup)": lambda text, number: f"<p>{text} &amp; <b>more</b></p><br/>",
    "(unicode)": lambda text, number: f"\ufeff{text}\x00\u200b\u202e {chr(0xD83D)}  ",
}
_BOMB = jpeg(Image.new("1", (20000, 20000)), 0, "PNG")
_PICTURES: dict[str, Callable[[Maker, int], bytes]] = {
    "empty_picture": lambda maker, number: b"",
    "broken_picture": lambda maker, number: jpeg(maker.clean_picture(number), 85)[: 400 + number % 700],
    "too_many_pixels": lambda maker, number: _BOMB,
    "format": lambda maker, number: jpeg(maker.clean_picture(number), 0, "TIFF"),
    "animated": lambda maker, number: jpeg(
        maker.clean_picture(number).convert("P"), 0, "GIF", save_all=True,
        append_images=[maker.clean_picture(number + 1).convert("P")],
    ),
    "aspect_ratio": lambda maker, number: jpeg(maker.clean_picture(number).resize((400, 120 - number % 40)), 85),
    "too_small": lambda maker, number: jpeg(maker.clean_picture(number).resize((40, 31 - number % 8)), 85),
    "single_colour": lambda maker, number: jpeg(
        Image.new("RGB", (128, 96), tuple(np.random.default_rng(number).integers(0, 256, 3).tolist())), 0, "PNG"
    ),
    "evaluation_picture": lambda maker, number: evaluation_picture(maker, number % EVALUATION),
    "evaluation_near_picture": lambda maker, number: _smaller(
        Image.open(io.BytesIO(evaluation_picture(maker, number % EVALUATION))), number
    ),
    "duplicate_picture": lambda maker, number: jpeg(maker.clean_picture(maker.original(number)), 85),
    "near_duplicate_picture": _near,
}  # fmt: skip


def evaluation_picture(maker: Maker, number: int) -> bytes:
    return jpeg(maker.clean_picture(10**9 + number), 90)


def write_evaluation_set(maker: Maker, folder: Path) -> None:
    with ShardWriter(folder, "evaluation") as writer:
        for number in range(EVALUATION):
            data = evaluation_picture(maker, number)
            width, height = Image.open(io.BytesIO(data)).size
            captions = [Caption(f"evaluation picture {number}", "en")]
            writer.add("test", Record(f"e{number}", data, captions, f"e{number}", "made", "CC0-1.0", width, height))


def write_tar(maker: Maker, folder: Path, tar: int, first: int, count: int) -> None:
    """One tar of records, and its truth: a table of keys and what is wrong with them."""
    path = folder / f"{tar:05d}.tar"
    keys, kinds = [], []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(first, first + count):
            kind, files = maker.record(number)
            keys.append(f"noisy/{tar:05d}/{number:09d}")
            kinds.append(kind)
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    pq.write_table(pa.table({"key": keys, "kind": kinds}), folder / f"{tar:05d}.truth")


def quality(folder: Path, out: Path, tars: Iterable[int]) -> list[dict[str, Any]]:
    """For every planted defect: how many, how many its rule took, and how many of those were planted."""
    truth: dict[str, str] = {}
    for tar in tars:
        table = pq.read_table(folder / "raw" / f"{tar:05d}.truth")
        truth.update(zip(table["key"].to_pylist(), table["kind"].to_pylist()))
    found = ds.dataset(sorted((out / "dropped").glob("*.parquet"))).to_table(filter=ds.field("level") == "record")
    rules = dict(zip(found["key"].to_pylist(), found["rule"].to_pylist()))
    dataset = open_dataset(out)
    kept = {row["key"]: row for name in dataset.splits for row in dataset.split(name).iter(["key", "captions"])}
    assert len(kept) + len(rules) == len(truth) and not kept.keys() & rules.keys(), "records were lost"
    rows = []
    planted = Counter(truth.values())
    # A copy of a copy is an equal one, too; of repeated captions the first stay. Truth allows for both.
    for kind in RATES:
        keys = {key for key, value in truth.items() if value == kind}
        taken = {key for key, rule in rules.items() if rule == kind}
        hits = len(keys & taken)
        wanted = len(keys)
        if kind == "near_duplicate_picture":
            wanted -= sum(rules.get(key) == "duplicate_picture" for key in keys)
        elif kind == "duplicate_picture":
            taken -= {key for key in taken if truth[key] == "near_duplicate_picture"}
        elif kind == "repeated_caption":
            wanted -= 2 * REPEATS
        elif kind.startswith("("):
            texts = [c["text"] for key in keys & kept.keys() for c in kept[key]["captions"]]
            hits = sum(1 for text in texts if not re.search(r"&\w+;|[<>\x00\u200b\u202e\ufeff\ud83d]|  ", text))
            wanted, taken = len(texts), set(range(hits))
        rows.append(
            {
                "rule": kind,
                "planted": planted[kind],
                "expected": wanted,
                "taken": len(taken),
                "recall": hits / wanted if wanted > 0 else None,
                "precision": hits / len(taken) if taken else None,
            }
        )
    clean = {key for key, kind in truth.items() if kind == ""}
    lost = Counter(rules[key] for key in clean if key in rules)
    rows.append({"rule": "(clean records)", "planted": len(clean), "lost": dict(lost)})
    return rows
