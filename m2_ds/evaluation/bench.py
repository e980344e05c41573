"""A model on the bench: what tasks ask for is embedded once, whatever the number of tasks, and remembered.

Shapes: N pictures, E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from m2_ds.data.image import decode
from m2_ds.evaluation.cache import Cache
from m2_ds.evaluation.config import EvaluationConfig, RetrievalTask, Task, Way
from m2_ds.evaluation.embed import (
    TEXTS_A_PICTURE,
    Embeddings,
    Listing,
    Model,
    Processor,
    TextEmbeddings,
    default_batch,
    embed_images,
    embed_texts,
    list_split,
)
from m2_ds.evaluation.matching import Matching
from m2_ds.evaluation.retrieval import RetrievalResult, retrieval
from m2_ds.evaluation.sources import Decode, Source, decode_as_release, identity, open_source
from m2_ds.parallel.collectives import broadcast_object
from m2_ds.parallel.mesh import SOLO, Group

_Place = tuple[str, ...]


@dataclass(frozen=True)
class View:
    """One part of a task: its pictures that are whole."""

    source: Source
    rows: list[int]  # N, of the source
    listing: Listing
    images: Tensor  # fp32 [N, E]
    skipped: list[str]  # keys of the pictures that can't be decoded


class Bench:
    """Every rank of ``group`` asks the same in the same order."""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        config: EvaluationConfig,
        device: torch.device | str,
        group: Group = SOLO,
        cache: Cache | None = None,
        out: Path | None = None,
    ) -> None:
        """``out``: where tasks may write files of their own; None: nowhere."""
        self.model, self.processor, self.config, self.device, self.group = model, processor, config, device, group
        self.cache, self.out = cache, out
        self.batch_size = config.batch_size or default_batch(device)
        self._views: dict[_Place, View] = {}
        self._texts: dict[str, dict[str, Tensor]] = {}
        self._retrieved: dict[_Place, dict[str, RetrievalResult]] = {}

    def view(self, task: Task, part: str) -> View:
        """Its pictures are embedded when it is first asked for."""
        place = _place(task, part)
        if place in self._views:
            return self._views[place]
        source = open_source(task, part)
        listing = list_split(source, task.limit)
        count = len(listing.keys)
        store = None
        if self.cache is not None:
            # The first rank's word counts: elsewhere the same files may have other times.
            told = broadcast_object(identity(source, count) if self.group.is_first else "", self.group)
            store = self.cache.pictures(told, _protocol(task), self.batch_size)
        images, whole = embed_images(
            self.model,
            self.processor,
            source,
            count,
            self.batch_size,
            self.device,
            threads=self.config.threads,
            group=self.group,
            read_picture=reader(task),
            skip_broken=self.config.skip_broken,
            store=store,
        )
        rows = whole.nonzero().flatten().tolist()
        if not rows:
            raise ValueError(f"{where(task, part)}: not one picture can be decoded")
        skipped = [listing.keys[row] for row in (~whole).nonzero().flatten().tolist()]
        if skipped:
            listing, images = listing.only(rows), images[rows]
        self._views[place] = View(source, rows, listing, images, skipped)
        return self._views[place]

    def texts(self, texts: Sequence[str], language: str) -> Tensor:
        """fp32 [len(texts), E]."""
        known = self._texts.setdefault(language, {})
        if fresh := [text for text in dict.fromkeys(texts) if text not in known]:
            features = embed_texts(
                self.model,
                self.processor,
                fresh,
                TEXTS_A_PICTURE * self.batch_size,
                self.device,
                group=self.group,
                what=f"texts {language}",
                store=None if self.cache is None else self.cache.texts(fresh, self.batch_size),
            )
            known.update(zip(fresh, features))
        return torch.stack([known[text] for text in texts])

    def embeddings(self, task: RetrievalTask, part: str) -> Embeddings:
        view = self.view(task, part)
        listing, texts = view.listing, {}
        for language in task.languages:
            different, text, owner = listing.texts(language, task.caption_kinds)
            if not different:
                raise ValueError(f"{where(task, part)} has no captions in {language!r} of kinds {task.caption_kinds}")
            texts[language] = TextEmbeddings(different, self.texts(different, language), text, owner)
        return Embeddings(view.images, listing.keys, listing.groups, listing.categories, texts)

    def matching(self, task: Task, part: str) -> Matching:
        """Its pictures and captions in one sequence. Raises ValueError for a model that has no words to tell."""
        view, threads = self.view(task, part), self.config.threads
        return Matching(
            self.model, self.processor, view.source, view.rows, reader(task), self.batch_size, self.device, threads,
            self.group,
        )  # fmt: skip

    def retrieval(self, task: RetrievalTask, part: str) -> dict[str, RetrievalResult]:
        """By language."""
        place = (task.title, part)
        if place not in self._retrieved:
            embeddings = self.embeddings(task, part)
            groups = embeddings.groups if task.match_groups else None
            self._retrieved[place] = {
                language: retrieval(embeddings.image, texts, groups, device=self.device)
                for language, texts in embeddings.texts.items()
            }
        return self._retrieved[place]


def where(task: Task, part: str) -> str:
    """A part of a task, as messages call it."""
    return f"split {part!r} of {task.dataset}" if task.dataset is not None else str(task.place)


def reader(task: Task) -> Decode:
    """How a task wants pictures decoded."""
    return decode_as_release if _protocol(task) == "release" else decode


def _place(task: Task, part: str) -> _Place:
    """Equal for tasks that read the same pictures and captions in the same way."""
    own: list[object] = []
    if task.kind == "retrieval" and task.list is not None:
        own = [task.images, task.language]
    elif task.kind == "zeroshot" and task.folder is not None:
        own = [task.labels]
    return tuple(map(str, (task.place, part, task.limit, _protocol(task), *own)))


def _protocol(task: Task) -> Way:
    return task.protocol if task.kind in ("retrieval", "zeroshot") else "fair"
