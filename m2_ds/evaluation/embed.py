"""Embeddings of a split: every picture once, every different caption once, on one process or several.

Shapes: N pictures, U different texts of a language, C captions (a caption is a text listed by a picture), E embedding.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2_ds.data.image import PictureError, decode
from m2_ds.evaluation.batches import compute
from m2_ds.evaluation.cache import Store
from m2_ds.evaluation.sources import Decode, Source
from m2_ds.parallel.mesh import SOLO, Group

# Pictures in a forward pass. On a CPU larger batches leave its caches: 256 took a fifth more time than 16, for a model
# of 192 as of 384 wide.
CPU_BATCH, GPU_BATCH = 16, 256
TEXTS_A_PICTURE = 4  # a caption has a fraction of a picture's tokens
BROKEN = -1  # marks a picture that can't be decoded; pixels are numbers from 0 on

log = logging.getLogger(__name__)


def default_batch(device: torch.device | str) -> int:
    """Pictures in a forward pass where nothing else was asked for."""
    return CPU_BATCH if torch.device(device).type == "cpu" else GPU_BATCH


class Model(Protocol):
    """What evaluation asks of a model; features have unit length."""

    def encode_image(self, images: Tensor) -> Tensor: ...

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor: ...


class Processor(Protocol):
    """What evaluation asks of a processor."""

    def images(self, images: Sequence[Image.Image]) -> Tensor: ...

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class TextEmbeddings:
    """Captions of one language. A text that several pictures list has one row of features and several captions."""

    texts: list[str]  # U, all different
    features: Tensor  # fp32 [U, E]
    text: Tensor  # int64 [C]: the caption's row in `texts`
    owner: Tensor  # int64 [C]: the picture that lists it


@dataclass(frozen=True)
class Embeddings:
    """Pictures in the split's order, and their captions by language. On the CPU."""

    image: Tensor  # fp32 [N, E]
    keys: list[str]
    groups: list[str]
    categories: list[str | None]
    texts: dict[str, TextEmbeddings] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """What a split says about its pictures, without the pictures."""

    keys: list[str]
    groups: list[str]
    categories: list[str | None]
    captions: list[list[dict[str, Any]]]
    hard_negatives: list[list[dict[str, Any]]]

    def texts(self, language: str, kinds: Sequence[str] | None = None) -> tuple[list[str], Tensor, Tensor]:
        """Different texts of a language, and each caption's text and picture (int64 [C], [C])."""
        rows: dict[str, int] = {}
        pairs = dict.fromkeys(
            (rows.setdefault(caption["text"], len(rows)), owner)
            for owner, captions in enumerate(self.captions)
            for caption in captions
            if caption["language"] == language and (kinds is None or caption["kind"] in kinds)
        )
        text, owner = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T.copy()
        return list(rows), torch.from_numpy(text), torch.from_numpy(owner)

    def only(self, rows: Sequence[int]) -> "Listing":
        """The listing of some of its pictures."""
        return Listing(
            [self.keys[row] for row in rows],
            [self.groups[row] for row in rows],
            [self.categories[row] for row in rows],
            [self.captions[row] for row in rows],
            [self.hard_negatives[row] for row in rows],
        )


def list_split(split: Source, limit: int | None = None) -> Listing:
    """Read everything but the pictures of a split's first `limit` rows."""
    columns = ["key", "group", "category", "captions", "hard_negatives"]
    rows = [row for row, _ in zip(split.iter(columns), range(len(split) if limit is None else limit))]
    return Listing(
        keys=[row["key"] for row in rows],
        groups=[row["group"] for row in rows],
        categories=[row["category"] for row in rows],
        captions=[row["captions"] or [] for row in rows],
        hard_negatives=[row["hard_negatives"] or [] for row in rows],
    )


def embed_split(
    model: Model,
    processor: Processor,
    split: Source,
    batch_size: int,
    device: torch.device | str,
    languages: Sequence[str],
    caption_kinds: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    threads: int = 2,
    group: Group = SOLO,
    read_picture: Decode = decode,
) -> Embeddings:
    """Embed a split's pictures and its captions of the given languages (and kinds; None: all).

    `batch_size`: pictures in one forward pass, and four times as many texts.

    Every rank of `group` must call it; each computes its share and all hold the whole. Raises ValueError for a picture
    that can't be decoded and for a language without captions.
    """
    listing = list_split(split, limit)
    texts = {}
    for language in languages:
        different, text, owner = listing.texts(language, caption_kinds)
        if not different:
            raise ValueError(
                f"split {split.name!r} of {split.folder} has no captions in {language!r}"
                f"{'' if caption_kinds is None else f' of kinds {list(caption_kinds)}'}; it has {dict(split.languages)}"
            )
        features = embed_texts(
            model, processor, different, TEXTS_A_PICTURE * batch_size, device, group=group, what=f"texts {language}"
        )  # fmt: skip
        texts[language] = TextEmbeddings(different, features, text, owner)
    image, _ = embed_images(
        model, processor, split, len(listing.keys), batch_size, device,
        threads=threads, group=group, read_picture=read_picture,
    )  # fmt: skip
    return Embeddings(image, listing.keys, listing.groups, listing.categories, texts)


def embed_images(
    model: Model,
    processor: Processor,
    split: Source,
    count: int,
    batch_size: int,
    device: torch.device | str,
    *,
    threads: int = 2,
    group: Group = SOLO,
    read_picture: Decode = decode,
    skip_broken: bool = False,
    store: Store | None = None,
) -> tuple[Tensor, Tensor]:
    """fp32 [count, E] of the first `count` pictures, and which of them are whole (bool [count]).

    Reading and decoding run ahead in `threads` threads. Pictures of equal pixels get the same vector to the last bit,
    whatever batches they were in, so that they tie. A picture that can't be decoded raises ValueError, or with
    `skip_broken` is not whole.
    """

    def load(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, marks = [], []
        for record in split.read(rows):
            try:
                images.append(processor.images([read_picture(record.image)]))  # one by one: a decoded one can be large
                marks.append(_pixels(images[-1]))
            except PictureError as error:
                if not skip_broken:
                    raise ValueError(
                        f"picture {record.key!r} of split {split.name!r} in {split.folder} can't be decoded ({error}): "
                        "evaluation leaves nothing out unless skip_broken is set; replace the picture, or take it out"
                    ) from error
                log.warning("picture %r of %s is left out: %s", record.key, split.folder, error)
                images.append(processor.images([Image.new("RGB", (8, 8))]))
                marks.append(BROKEN)
        return torch.cat(images), torch.tensor(marks)

    def encode(loaded: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, marks = loaded
        return model.encode_image(images.to(device)).float(), marks

    batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    found = compute(
        batches, load, encode, what=f"pictures {split.name}", threads=threads, group=group, store=store
    )  # fmt: skip
    whole = found.marks != BROKEN
    if not skip_broken and not bool(whole.all()):  # an earlier evaluation skipped it: say which one it is
        load((~whole).nonzero().flatten().tolist())
    first: dict[int, int] = {}
    same = [first.setdefault(mark, row) for row, mark in enumerate(found.marks.tolist())]
    return found.features[same], whole


def embed_texts(
    model: Model,
    processor: Processor,
    texts: Sequence[str],
    batch_size: int,
    device: torch.device | str,
    *,
    group: Group = SOLO,
    what: str = "texts",
    store: Store | None = None,
) -> Tensor:
    """fp32 [U, E], in the order of `texts`; texts of like length share a batch, so that little is padded.

    Texts that are the same tokens get the same vector to the last bit.
    """
    ids, mask = processor.texts(texts)
    lengths = mask.sum(1).tolist()
    first: dict[bytes, int] = {}
    same = [
        first.setdefault(row[:length].numpy().tobytes(), place) for place, (row, length) in enumerate(zip(ids, lengths))
    ]
    different = sorted(set(same), key=lambda row: (lengths[row], row))

    def load(places: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = [different[place] for place in places]
        longest = max(lengths[row] for row in rows)
        return ids[rows, :longest], mask[rows, :longest]

    def encode(loaded: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ids, mask = loaded
        return model.encode_text(ids.to(device), mask.to(device)).float(), torch.zeros(len(ids), dtype=torch.int64)

    count = len(different)
    batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    features = compute(batches, load, encode, what=what, group=group, store=store).features
    place_of = {row: place for place, row in enumerate(different)}
    return features[[place_of[row] for row in same]]


def _pixels(image: Tensor) -> int:
    """63 bits that stand for a picture's pixels."""
    return int.from_bytes(hashlib.blake2b(image.contiguous().numpy().data, digest_size=8).digest()) >> 1
