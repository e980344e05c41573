"""Small data sets of image-text pairs, and a tokenizer that needs no training."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from m2_ds.data.shards import Caption, Dataset, Record, ShardWriter, open_dataset


class ByteTokenizer:
    """Ids are the bytes of the text plus one; 0 pads."""

    def encode(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [[byte + 1 for byte in text.encode()] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return ids, (ids > 0).long()


def text_of(ids: torch.Tensor) -> str:
    """The text of one row of a ByteTokenizer's ids."""
    return bytes(i - 1 for i in ids.tolist() if i).decode()


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def picture(number: int, side: int = 12) -> np.ndarray:
    """uint8 [side, side, 3], one colour that tells the number apart."""
    return np.full((side, side, 3), (number % 256, number // 256 % 256, 100), dtype=np.uint8)


def record(number: int, name: str = "pair") -> Record:
    return Record(
        key=f"{name}/{number}",
        image=encoded(picture(number)),
        captions=[
            Caption(f"{name} {number}", "en"),
            Caption(f"{name} number {number}", "en", 0.25, "keywords"),
            Caption(f"{name} 第{number}", "zh"),
        ],
        group=f"group {number // 2}",
        source=name,
        license="CC0-1.0",
        width=12,
        height=12,
    )


def make_dataset(
    folder: Path,
    rows: int,
    *,
    name: str = "pair",
    group_rows: int = 7,
    change: Callable[[int, Record], Record] = lambda number, made: made,
    **splits: int,
) -> Dataset:
    """A data set of `rows` training pairs (and of other splits), in row groups of 7 and several shards."""
    with ShardWriter(folder, name, group_rows=group_rows, shard_bytes=1200) as writer:
        number = 0
        for split, count in {"train": rows, **splits}.items():
            for _ in range(count):
                writer.add(split, change(number, record(number, name)))
                number += 1

    return open_dataset(folder)
