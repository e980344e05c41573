"""The M2-Encoder release's own retrieval evaluation: how it prepares data, and how it counts.

Re-derived from what its eval_retrieval.py computes (github.com/alipay/Ant-Multi-Modal-Framework, prj/M2_Encoder).

Shapes: M lines of the list, C captions in the order of the file, N different pictures, U different texts, E embedding.

It differs from `m2_ds.evaluation.retrieval` in three points. A text that is listed several times stands among the
candidates as often, but only its last place counts as right. A picture that several lines name is a candidate as often,
and only its last line counts as right for its captions. Equal scores are in the order in which numpy's argsort leaves
them, which is unspecified, where the other shares the chance.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

KS = (1, 5, 10)
BLOCK = 512  # queries whose scores exist at a time: 100 MB, and as much of order, against COCO's 25,000 captions

_QUOTES = str.maketrans({"“": '"', "”": '"'})


def clean(text: str) -> str:
    """Lower case, and straight double quotation marks."""
    return text.lower().translate(_QUOTES)


def open_as_release(data: bytes) -> Image.Image:
    """RGB by Pillow's conversion: not turned by EXIF, transparency dropped."""
    return Image.open(io.BytesIO(data)).convert("RGB")


class Listed(NamedTuple):
    """A list's content in its own order. int64 arrays."""

    picture: np.ndarray  # [M]: which of the N pictures the line names
    text: np.ndarray  # [C]: which of the U texts the caption is
    line: np.ndarray  # [C]: the line that lists it

    @classmethod
    def of(cls, pictures: Sequence[int], captions: Sequence[Sequence[int]]) -> "Listed":
        """From each line's picture and texts, as rows of features."""
        text = [text for line in captions for text in line]
        line = [number for number, texts in enumerate(captions) for _ in texts]
        return cls(*(np.array(values, dtype=np.int64) for values in (pictures, text, line)))


def release_recall(image: Tensor, text: Tensor, listed: Listed) -> dict[str, float]:
    """Percentages from image fp32 [N, E] and text fp32 [U, E]: image_to_text/r1, ..., text_to_image/r10, mean_recall.

    The release computes scores in fp64 from fp32 features, and so does this. Raises ValueError for features that are
    not finite.
    """
    images, texts = (features.double().numpy() for features in (image, text))
    if not (np.isfinite(images).all() and np.isfinite(texts).all()):
        raise ValueError("the embeddings hold NaN or infinity: the weights they came from have diverged")
    last_of_text = _last(listed.text, len(texts))
    last_of_picture = _last(listed.picture, len(images))
    # Whatever line a text stands in, it is right for the pictures of all lines that list it; so both ways.
    owner = listed.picture[listed.line]
    captions_of = _lists(owner, last_of_text[listed.text], len(images))
    pictures_of = _lists(listed.text, last_of_picture[owner], len(texts))
    found = {}
    for way, queries, candidates, right in (
        ("text_to_image", texts[listed.text], images[listed.picture], [pictures_of[row] for row in listed.text]),
        ("image_to_text", images[listed.picture], texts[listed.text], [captions_of[row] for row in listed.picture]),
    ):
        hits = _hits(queries, candidates, right)
        found.update({f"{way}/r{k}": 100 * float(hits[:, k - 1].mean()) for k in KS})
    return {**found, "mean_recall": sum(found.values()) / len(found)}


def _last(values: np.ndarray, count: int) -> np.ndarray:
    """[count]: the last place of each value; -1 where it has none."""
    found = np.full(count, -1, dtype=np.int64)
    np.maximum.at(found, values, np.arange(len(values)))
    return found


def _lists(owners: np.ndarray, values: np.ndarray, count: int) -> list[np.ndarray]:
    """The different values of each owner."""
    pairs = np.unique(np.stack([owners, values], axis=1), axis=0)
    starts = np.searchsorted(pairs[:, 0], np.arange(1, count))
    return np.split(pairs[:, 1], starts)


def _hits(queries: np.ndarray, candidates: np.ndarray, right: list[np.ndarray]) -> np.ndarray:
    """bool [Q, 10]: whether one of the query's right candidates is among the first k + 1."""
    hits = np.zeros((len(queries), KS[-1]), dtype=bool)
    for first in range(0, len(queries), BLOCK):
        order = np.argsort(-(queries[first : first + BLOCK] @ candidates.T), axis=1)[:, : KS[-1]]
        for row, places in enumerate(order, first):
            hits[row, : len(places)] = np.isin(places, right[row])
    return np.logical_or.accumulate(hits, axis=1)
