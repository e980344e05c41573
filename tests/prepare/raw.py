"""Raw pairs for the tests of preparation: pictures that pass all rules, and files of every kind that hold them."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from m2_ds.data.reader import open_dataset
from m2_ds.data.records import Record
from m2_ds.prepare.config import PrepareConfig
from m2_ds.prepare.pairs import Ledger
from m2_ds.prepare.run import run

ADJECTIVES = ["small", "large", "bright", "dark", "quiet", "sleepy", "wooden", "golden", "purple", "frozen"]
NOUNS = ["harbour", "castle", "kitchen", "tractor", "violin", "teapot", "lighthouse", "panda", "bicycle", "orchard"]


def pixels(number: int, width: int = 64, height: int = 64) -> np.ndarray:
    """uint8 [height, width, 3]: soft blobs, another picture for every number."""
    draw = np.random.default_rng(number)
    small = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(out, kind, **options)
    return out.getvalue()


def image(number: int) -> bytes:
    return encoded(pixels(number))


def caption(number: int) -> str:
    return f"a {ADJECTIVES[number % 10]} {NOUNS[number // 10 % 10]}, number {number}"


def write_tar(path: Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, files in records:
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def plain(number: int, **fields: Any) -> tuple[str, dict[str, bytes]]:
    """A record of a tar: (name, files)."""
    content = {"caption": caption(number)} | fields
    return f"{number:05d}", {"png": image(number), "json": json.dumps(content).encode()}


def tars(folder: Path, count: int, each: int = 5) -> str:
    """Tars of plain records; their pattern."""
    for number in range(0, count, each):
        write_tar(folder / f"{number // each:03d}.tar", [plain(n) for n in range(number, min(count, number + each))])
    return str(folder / "*.tar")


def config(out: Path, files: Any, kind: str = "tar", **fields: Any) -> PrepareConfig:
    """A preparation without Ray; `fields` are blocks of the configuration, `entry` further fields of its input."""
    entry = {"name": "raw", "kind": kind, "files": files, "license": "CC0-1.0"} | fields.pop("entry", {})
    work = {"workers": 0, "progress": False, "retries": 0} | fields.pop("work", {})
    tree = {"out": out, "inputs": [entry], "work": work, "picture": {"min_side": 16}} | fields
    return PrepareConfig.model_validate(tree)


def prepare(out: Path, files: Any, kind: str = "tar", **fields: Any) -> tuple[Ledger, list[Record]]:
    """(counts, records that were kept, in order)."""
    return run(config(out, files, kind, **fields), out.parent), kept(out)


def kept(out: Path, split: str = "train") -> list[Record]:
    there = open_dataset(out).split(split)
    return there.read(range(len(there)))


def dropped(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in sorted((out / "dropped").glob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return rows


def rules(out: Path) -> dict[str, str]:
    """What became of each record that was left out: the last part of its key -> rule."""
    return {row["key"].rsplit("/", 1)[-1]: row["rule"] for row in dropped(out) if row["level"] == "record"}


def snapshot(out: Path) -> dict[str, bytes]:
    """The bytes of everything that a preparation leaves, but times and its own notes."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in files
        if ".prepare" not in path.parts and path.name != "timing.json"
    }


def changed(number: int, change: Callable[[dict[str, bytes]], None]) -> tuple[str, dict[str, bytes]]:
    """A plain record after a change of its files."""
    name, files = plain(number)
    change(files)
    return name, files
