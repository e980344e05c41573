"""Recall of captions by pictures and of pictures by captions, exact, in tiles, with ties shared out fairly.

Shapes: N pictures, U different texts, C captions, E embedding, G groups.

What is right. A text is right for a picture if a picture of the same group lists it (or the picture itself, when groups
are not used). Candidates of a picture are all C captions, repeated texts as often as they are listed; candidates of a
caption are all N pictures. A query counts as found at k if any right candidate is among its first k, as the public
retrieval evaluations of CLIP models count it.

Ties. Candidates of equal score have no order. Instead of letting an index decide, the chance that a right one comes
into the first k is taken over all orders, so that a model with constant features gets what guessing gets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2_ds.evaluation.embed import TextEmbeddings

KS = (1, 5, 10)
TILE = 2048  # rows and columns of the score matrix that exist at a time: 16 MB


@dataclass(frozen=True)
class Ranking:
    """How the queries of one direction fared. Q queries; captions of one text share a query, `weight` counts them."""

    recall: dict[int, float]  # by k, share of the captions or pictures that were queries
    query: Tensor  # int64 [Q]: row of the picture or text
    rank: Tensor  # fp64 [Q]: expected place of the first right candidate, from 1
    weight: Tensor  # fp64 [Q]


@dataclass(frozen=True)
class RetrievalResult:
    image_to_text: Ranking
    text_to_image: Ranking

    @property
    def mean_recall(self) -> float:
        """Mean of the recalls of both directions, a share."""
        values = [*self.image_to_text.recall.values(), *self.text_to_image.recall.values()]
        return sum(values) / len(values)

    def metrics(self) -> dict[str, float]:
        """Percentages: image_to_text/r1, ..., text_to_image/r10, mean_recall."""
        found = {
            f"{direction}/r{k}": 100 * value
            for direction in ("image_to_text", "text_to_image")
            for k, value in getattr(self, direction).recall.items()
        }
        return {**found, "mean_recall": 100 * self.mean_recall}


class Relevance:
    """Which texts are right for which pictures, without an N x U matrix: through the groups that list a text."""

    def __init__(self, pictures: int, texts: TextEmbeddings, groups: Sequence[str] | None) -> None:
        """`groups`: one name a picture; None makes every picture its own group."""
        if groups is None:
            self.group = torch.arange(pictures)
        else:
            numbers: dict[str, int] = {}
            self.group = torch.tensor([numbers.setdefault(name, len(numbers)) for name in groups])
        count, different = int(self.group.max()) + 1, len(texts.texts)
        listed = torch.unique(self.group[texts.owner] * different + texts.text)
        self._texts = listed % different  # texts of group 0, of group 1, ...
        self._start = torch.searchsorted(listed, torch.arange(count + 1) * different)
        self.multiplicity = torch.bincount(texts.text, minlength=different)

    def pairs(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Right pairs of pictures first..last-1: (picture - first, text), sorted by text."""
        group = self.group[first:last]
        start = self._start[group]
        count = self._start[group + 1] - start
        picture = torch.repeat_interleave(torch.arange(last - first), count)
        inside = torch.arange(len(picture)) - torch.repeat_interleave(torch.cumsum(count, 0) - count, count)
        text = self._texts[torch.repeat_interleave(start, count) + inside]
        order = torch.argsort(text, stable=True)
        return picture[order], text[order]

    def right(self, picture: int) -> Tensor:
        """Texts that are right for one picture, int64."""
        return self.pairs(picture, picture + 1)[1]


def retrieval(
    image: Tensor,
    texts: TextEmbeddings,
    groups: Sequence[str] | None = None,
    *,
    ks: Sequence[int] = KS,
    tile: int = TILE,
    device: torch.device | str = "cpu",
) -> RetrievalResult:
    """Both directions over fp32 features: image [N, E] against texts.features [U, E].

    Takes 2 N U E operations, and once more for the tiles that hold right pairs. Raises ValueError for features that are
    not finite.
    """
    image, text = image.float().to(device), texts.features.float().to(device)
    if not (bool(image.isfinite().all()) and bool(text.isfinite().all())):
        raise ValueError("the embeddings hold NaN or infinity: the weights they came from have diverged")
    relevance = Relevance(len(image), texts, groups)
    images, captions = _tally(image, text, relevance, tile)
    return RetrievalResult(_ranking(images, torch.ones(len(image)), ks), _ranking(captions, relevance.multiplicity, ks))


def chance_in_top(above: Tensor, tied: Tensor, right: Tensor, k: int) -> Tensor:
    """Chance (fp64) that a right candidate is among the first k: `above` wrong ones score higher than the best right
    one, and at its score stand `tied` wrong and `right` right ones in random order."""
    miss = torch.ones(above.shape, dtype=torch.float64)
    room = k - above
    for place in range(k):
        stays = (tied - place).clamp(min=0) / (tied + right - place).clamp(min=1).double()
        miss = torch.where(place < room, miss * stays, miss)
    return 1 - miss


def top_k(queries: Tensor, candidates: Tensor, k: int, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """Best k candidates of each query: scores fp32 [Q, k] and rows int64 [Q, k]; equal scores in order of rows."""
    k = min(k, len(candidates))
    scores = torch.full((len(queries), 0), 0.0)
    rows = torch.zeros((len(queries), 0), dtype=torch.int64)
    for first in range(0, len(candidates), tile):
        part = queries.float() @ candidates[first : first + tile].float().T
        places = torch.arange(first, first + part.shape[1]).expand(len(queries), -1)
        scores, rows = torch.cat([scores, part], 1), torch.cat([rows, places], 1)
        order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
        scores, rows = scores.gather(1, order), rows.gather(1, order)
    return scores, rows


@dataclass
class _Tally:
    """Candidates of each query: wrong ones above its best right one, wrong and right ones at its score. int64 [Q]."""

    above: Tensor
    tied: Tensor
    right: Tensor

    @staticmethod
    def zeros(queries: int, device: torch.device) -> "_Tally":
        return _Tally(*(torch.zeros(queries, dtype=torch.int64, device=device) for _ in range(3)))


def _tiles(relevance: Relevance, texts: int, tile: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows and columns of each tile, and its right pairs (row and column within the tile)."""
    lefts = torch.arange(0, texts, tile)
    edges = torch.cat([lefts, torch.tensor([texts])])
    pictures = len(relevance.group)
    for top in range(0, pictures, tile):
        bottom = min(top + tile, pictures)
        picture, text = relevance.pairs(top, bottom)
        cuts = torch.searchsorted(text, edges).tolist()
        for place, left in enumerate(lefts.tolist()):
            pair = slice(cuts[place], cuts[place + 1])
            yield slice(top, bottom), slice(left, min(left + tile, texts)), picture[pair], text[pair] - left


def _tally(image: Tensor, text: Tensor, relevance: Relevance, tile: int) -> tuple[_Tally, _Tally]:
    """For pictures, then for texts. Every score is taken from a product of the same shape in both passes: another way
    of computing a right pair's score would differ in its last bits, and ties would be won or lost by that."""
    device = image.device
    image_best = torch.full((len(image),), -torch.inf, device=device)
    text_best = torch.full((len(text),), -torch.inf, device=device)
    for rows, columns, picture, caption in _tiles(relevance, len(text), tile):
        if len(picture):
            picture, caption = picture.to(device), caption.to(device)
            scores = (image[rows] @ text[columns].T)[picture, caption]
            image_best[rows].scatter_reduce_(0, picture, scores, "amax")
            text_best[columns].scatter_reduce_(0, caption, scores, "amax")

    images, texts = _Tally.zeros(len(image), device), _Tally.zeros(len(text), device)
    listed = relevance.multiplicity.to(device)
    weight = listed.float()
    ones = torch.ones(len(image), device=device)
    buffer = torch.empty(min(tile, len(image)), min(tile, len(text)), device=device)
    for rows, columns, picture, caption in _tiles(relevance, len(text), tile):
        scores = image[rows] @ text[columns].T
        # Counted as products with 0/1 matrices in fp32: exact below 2^24, and ten times faster than sums of booleans.
        held = buffer[: scores.shape[0], : scores.shape[1]]
        best, count = image_best[rows, None], weight[columns]
        images.above[rows] += (torch.gt(scores, best, out=held) @ count).long()
        images.tied[rows] += (torch.eq(scores, best, out=held) @ count).long()
        best, count = text_best[columns], ones[rows]
        texts.above[columns] += (count @ torch.gt(scores, best, out=held)).long()
        texts.tied[columns] += (count @ torch.eq(scores, best, out=held)).long()
        if len(picture):
            picture, caption = picture.to(device), caption.to(device)
            right = scores[picture, caption]
            at_best = (right == image_best[rows][picture]) * listed[columns][caption]
            images.right[rows].scatter_add_(0, picture, at_best)
            texts.right[columns].scatter_add_(0, caption, (right == text_best[columns][caption]).long())
    for tally in (images, texts):
        tally.tied -= tally.right
    return images, texts


def _ranking(tally: _Tally, weight: Tensor, ks: Sequence[int]) -> Ranking:
    above, tied, right = tally.above.cpu(), tally.tied.cpu(), tally.right.cpu()
    query = torch.nonzero(right > 0).flatten()  # the others have no right candidate in this language
    above, tied, right, weight = above[query], tied[query], right[query], weight[query].double()
    recall = {k: float((chance_in_top(above, tied, right, k) * weight).sum() / weight.sum()) for k in ks}
    return Ranking(recall, query, 1 + above + tied / (right + 1.0), weight)
