"""Signatures of evaluation pictures and captions, made once, so that no unit of the input brings one into training."""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from m2_ds.data.decode import PictureError, decode
from m2_ds.data.reader import open_dataset
from m2_ds.prepare.neighbours import Index
from m2_ds.prepare.picture import COLOURS, mean_colours, perceptual_hashes, thumbnail
from m2_ds.prepare.text import clean
from m2_ds.prepare.work import Job, TableFile, read_table

STEP = "evaluation"
_SCHEMA = pa.schema(
    [("sha256", pa.binary(16)), ("phash", pa.uint64()), ("colours", pa.binary(COLOURS)), ("name", pa.string())]
)
_PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_BATCH = 256


def digest(data: bytes) -> bytes:
    """The first 16 bytes of a picture's SHA-256."""
    return hashlib.sha256(data).digest()[:16]


def text_digest(text: str) -> bytes:
    """16 bytes of a cleaned caption, in any case."""
    return hashlib.blake2b(clean(text).casefold().encode(), digest_size=16).digest()


def check(path: Path) -> None:
    """ValueError where a path is neither a data set nor a folder of pictures."""
    if not path.is_dir():
        raise ValueError(f"evaluation_sets.paths: {path} is no folder")
    if not (path / "manifest.json").exists() and next(_files(path), None) is None:
        raise ValueError(f"evaluation_sets.paths: {path} holds neither a data set (manifest.json) nor pictures")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _PICTURES)


def _items(path: Path) -> Iterator[tuple[str, bytes, list[str]]]:
    if not (path / "manifest.json").exists():
        yield from ((str(file), file.read_bytes(), []) for file in _files(path))
        return
    dataset = open_dataset(path)
    for name in dataset.splits:
        for row in dataset.split(name).iter(columns=["key", "image", "captions"]):
            yield f"{path.name} {name} {row['key']}", row["image"], [c["text"] for c in row["captions"]]


def sign(job: Job, item: tuple[int, str]) -> dict[str, Any]:
    """One evaluation set: NUMBER.parquet with its pictures' signatures, NUMBER.captions.parquet with its texts'."""
    number, path = item
    pending: list[tuple[str, bytes, np.ndarray]] = []
    texts: set[bytes] = set()
    count = 0

    def flush() -> None:
        if pending:
            thumbnails = np.stack([entry[2] for entry in pending])
            columns = {
                "sha256": [entry[1] for entry in pending],
                "phash": perceptual_hashes(thumbnails),
                "colours": [row.tobytes() for row in mean_colours(thumbnails)],
                "name": [entry[0] for entry in pending],
            }
            file.write(pa.table(columns, schema=_SCHEMA))
            pending.clear()

    with TableFile(job.path(STEP, number, "parquet"), _SCHEMA) as file:
        for name, data, captions in _items(Path(path)):
            texts.update(map(text_digest, captions))
            try:
                picture = decode(data, lambda w, h: min(1.0, 64 / min(w, h)))
            except PictureError as error:
                raise ValueError(f"evaluation set {path}: {name}: {error}; take it out or repair it") from None
            pending.append((name, digest(data), thumbnail(picture)))
            count += 1
            if len(pending) == _BATCH:
                flush()
        flush()
    schema = pa.schema([("text", pa.binary(16))])
    with TableFile(job.path(STEP, number, "captions.parquet"), schema) as file:
        file.write(pa.table({"text": sorted(texts)}, schema=schema))
    job.finish(STEP, number, {"path": path, "pictures": count, "captions": len(texts)})
    return {}


class Evaluation:
    """What a worker holds of all evaluation sets: about 400 bytes a picture."""

    def __init__(self, job: Job) -> None:
        sets = job.config.evaluation_sets
        table = pa.concat_tables(
            [read_table(job.path(STEP, number, "parquet")) for number in range(len(sets.paths))]
            or [_SCHEMA.empty_table()]
        )
        self.names = table["name"]
        colours = np.frombuffer(b"".join(table["colours"].to_pylist()), dtype=np.uint8).reshape(-1, COLOURS)
        self.index = Index(
            np.array(table["sha256"].to_pylist(), dtype=object),
            table["phash"].to_numpy(),
            colours,
            sets.near_distance,
            sets.near_colour,
        )
        self.texts: set[bytes] = set()
        for number in range(len(sets.paths) if sets.captions else 0):
            self.texts.update(read_table(job.path(STEP, number, "captions.parquet"))["text"].to_pylist())


@functools.lru_cache(maxsize=1)
def opened(job: Job) -> Evaluation:
    """The evaluation sets of a job, read once a worker."""
    return Evaluation(job)
