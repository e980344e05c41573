"""What a model finds, to look at: queries with their top pictures, pictures with their top captions, worst mistakes.

Everything is JSON-able; pictures are numbers that stand for small data URIs, each kept once. Shapes: N pictures.
"""

import base64
import io
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from m2_ds.data.image import decode
from m2_ds.evaluation.embed import Embeddings, TextEmbeddings
from m2_ds.evaluation.retrieval import Ranking, Relevance, RetrievalResult, top_k
from m2_ds.evaluation.sources import Decode, Source

TOP = 5
QUERIES, PICTURES, MISTAKES = 9, 9, 6
THUMBNAIL = 112  # pixels; shown at about half of that, so sharp on dense screens


def gallery(
    split: Source,
    rows: Sequence[int],
    embeddings: Embeddings,
    results: Mapping[str, RetrievalResult],
    task: str,
    match_groups: bool = True,
    read_picture: Decode = decode,
) -> dict[str, Any]:
    """The gallery of one split; `results` by language, `rows` of the pictures in the split. The same pictures are
    chosen whatever the model."""
    groups = embeddings.groups if match_groups else None
    views = {
        language: _View(embeddings, texts, Relevance(len(embeddings.keys), texts, groups), results[language])
        for language, texts in embeddings.texts.items()
    }
    chosen = _spread(embeddings, QUERIES + PICTURES, views)
    queries, pictures = chosen[:QUERIES], chosen[QUERIES:] or chosen[:PICTURES]
    shown: dict[str, Any] = {
        "task": task,
        "split": split.name,
        "languages": list(views),
        "pictures_in_all": len(embeddings.keys),
        "queries": [
            {
                "picture": row,
                "by_language": {lang: view.pictures_for(view.caption(row)) for lang, view in views.items()},
            }
            for row in queries
        ],
        "pictures": [
            {"picture": row, "by_language": {lang: view.captions_for(row) for lang, view in views.items()}}
            for row in pictures
        ],
        "mistakes": {lang: _mistakes(view) for lang, view in views.items()},
    }
    wanted = sorted(_pictures_in(shown))
    found = split.read([rows[picture] for picture in wanted])
    shown["thumbnails"] = {str(row): _thumbnail(read_picture(record.image)) for row, record in zip(wanted, found)}
    shown["picture_keys"] = {str(row): embeddings.keys[row] for row in wanted}
    return shown


class _View:
    """One language's captions over the pictures."""

    def __init__(
        self, embeddings: Embeddings, texts: TextEmbeddings, relevance: Relevance, result: RetrievalResult
    ) -> None:
        self.image, self.texts, self.relevance, self.result = embeddings.image, texts, relevance, result
        ranking = result.text_to_image
        self.rank = {text: round(rank) for text, rank in zip(ranking.query.tolist(), ranking.rank.tolist())}
        self.first_caption: dict[int, int] = {}
        self.owner: dict[int, int] = {}
        for text, owner in zip(texts.text.tolist(), texts.owner.tolist()):
            self.first_caption.setdefault(owner, text)
            self.owner.setdefault(text, owner)

    def caption(self, picture: int) -> int:
        """The picture's own first caption, or one of its group's."""
        own = self.first_caption.get(picture)
        return int(self.relevance.right(picture)[0]) if own is None else own

    def pictures_for(self, text: int) -> dict[str, Any]:
        scores, rows = top_k(self.texts.features[text : text + 1], self.image, TOP)
        top = [
            {"picture": row, "score": round(score, 4), "right": bool((self.relevance.right(row) == text).any())}
            for row, score in zip(rows[0].tolist(), scores[0].tolist())
        ]
        return {"text": self.texts.texts[text], "rank": self.rank[text], "top": top}

    def captions_for(self, picture: int) -> list[dict[str, Any]]:
        scores, rows = top_k(self.image[picture : picture + 1], self.texts.features, TOP)
        right = set(self.relevance.right(picture).tolist())
        return [
            {"text": self.texts.texts[row], "score": round(score, 4), "right": row in right}
            for row, score in zip(rows[0].tolist(), scores[0].tolist())
        ]


def _mistakes(view: _View) -> dict[str, Any]:
    return {
        "text_to_image": [
            {**view.pictures_for(text), "right": view.owner[text]} for text, _ in _worst(view.result.text_to_image)
        ],
        "image_to_text": [
            {"picture": row, "rank": rank, "right": view.texts.texts[view.caption(row)], "top": view.captions_for(row)}
            for row, rank in _worst(view.result.image_to_text)
        ],
    }


def _spread(embeddings: Embeddings, count: int, views: dict[str, _View]) -> list[int]:
    """Pictures with captions in every language, from the categories in turn, in the order of a hash of the key."""
    by_category: dict[str, list[int]] = {}
    for row in sorted(range(len(embeddings.keys)), key=lambda row: zlib.crc32(embeddings.keys[row].encode())):
        if all(row in view.first_caption for view in views.values()):
            by_category.setdefault(embeddings.categories[row] or "", []).append(row)
    turns = [sorted(rows[i] for rows in by_category.values() if i < len(rows)) for i in range(count)]
    return [row for turn in turns for row in turn][:count]


def _worst(ranking: Ranking) -> list[tuple[int, int]]:
    """Queries whose first right candidate stands lowest, and where; those that failed only."""
    order = torch.argsort(ranking.rank, descending=True, stable=True)[:MISTAKES].tolist()
    return [(int(ranking.query[i]), round(float(ranking.rank[i]))) for i in order if ranking.rank[i] > 1]


def _pictures_in(node: Any) -> set[int]:
    """Every number under "picture", and every picture that is a right answer."""
    if isinstance(node, dict):
        own = {value for key, value in node.items() if key in ("picture", "right") and type(value) is int}
        return own.union(*(_pictures_in(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(_pictures_in(value) for value in node))
    return set()


def _thumbnail(picture: Image.Image) -> str:
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=78, method=4)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
