"""The batches of a step: one rank of each data-parallel position reads and decodes, those that share its model receive.

Tensor-parallel ranks of the first stage get everything. Later stages of a pipeline get no pictures (their `images` are
[b, 3, 0, 0]), but the last one does where it rebuilds hidden patches (loss.cmim). What the reading rank cannot read
stops all of them.
Legend: b pairs of a micro-batch, C captions a picture, L tokens of the longest caption.
"""

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from m2_ds.config import RunConfig
from m2_ds.data.batch import PairBatch, by_length
from m2_ds.data.pairs import PairDataset
from m2_ds.data.stream import build_loader
from m2_ds.data.text import Tokenizer
from m2_ds.parallel.collectives import broadcast, broadcast_object, receive, send
from m2_ds.parallel.mesh import Group, Mesh

KIND = "batches"  # under which traffic counts them


@dataclass(frozen=True)
class _Failure:
    """What the reading rank met with."""

    message: str
    wrong_input: bool  # a ValueError

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        return cls(str(error) or type(error).__name__, isinstance(error, ValueError))

    def told(self) -> Exception:
        kind = ValueError if self.wrong_input else RuntimeError
        return kind(f"the rank that reads this rank's batches has stopped: {self.message}")


@dataclass(frozen=True)
class _Outline:
    """A micro-batch without its numbers."""

    captions: int
    pairs: int
    length: int
    side: int
    keys: list[str]
    skipped: dict[str, int]
    other_language: int

    @classmethod
    def of(cls, batch: PairBatch) -> "_Outline":
        captions, pairs, length = batch.ids.shape
        return cls(
            captions, pairs, length, batch.images.shape[-1], batch.keys, batch.skipped, batch.other_language
        )  # fmt: skip

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of ids, mask, language, group and slot."""
        text = (self.captions, self.pairs, self.length)
        return [text, text, text[:2], (self.pairs,), (self.pairs,)]


class StepBatches:
    """This rank's micro-batches of one step after another, on its device. Close it.

    ``stream``: what reads them, on the ranks that do (the first rank of the job is one). Every rank makes one; all
    raise ValueError for a source that cannot be read.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        tokenizer: Tokenizer,
        start_sample: int,
        left_out: Collection[int] = (),
    ) -> None:
        """``left_out``: first slots of global batches that are passed over."""
        self.mesh = mesh
        self.micro_batch, self.accumulation = config.batch_shape(mesh.data_parallel.size)
        self.sort = config.data.sort_by_length
        self.pictures_at_end = config.loss.cmim.weight > 0 and mesh.pipeline.size > 1
        self.shared = mesh.tensor.size * mesh.pipeline.size > 1
        self.reads = mesh.tensor.is_first and mesh.pipeline.is_first
        self.stream: PairDataset | None = None
        self._batches: Generator[PairBatch, None, None] | None = None
        failed: Exception | None = None
        try:
            if self.reads:
                loader = build_loader(
                    config.data,
                    tokenizer,
                    global_batch=config.global_batch,
                    micro_batch=self.micro_batch,
                    accumulation=self.accumulation,
                    seed=config.seed,
                    start_sample=start_sample,
                    left_out=left_out,
                    rank=mesh.data_parallel.rank,
                    world_size=mesh.data_parallel.size,
                )
                self.stream = loader.dataset
                self._batches = cast(Generator[PairBatch, None, None], iter(loader))
        except Exception as error:
            failed = error
        self._stop_all(failed, None if failed is None else _Failure.of(failed))

    def close(self) -> None:
        """End reading: a loader that still works while Python goes down may abort the process."""
        if self._batches is not None:
            self._batches.close()

    def __next__(self) -> list[PairBatch]:
        """The next step's micro-batches. Every rank of the job calls it equally often."""
        if not self.shared:
            return self._read()
        own: list[PairBatch] = []
        said: Any = None
        failed: Exception | None = None
        if self.reads:
            try:
                own = self._read()
                said = [_Outline.of(batch) for batch in own]
            except Exception as error:
                failed, said = error, _Failure.of(error)
        said = self._stop_all(failed, said)
        return self._share(said, own)

    def _read(self) -> list[PairBatch]:
        assert self._batches is not None
        found = [next(self._batches) for _ in range(self.accumulation)]
        if self.sort and len(found) > 1:
            return by_length(found, self.mesh.device)
        return [batch.to(self.mesh.device) for batch in found]

    def _stop_all(self, failed: Exception | None, said: Any) -> Any:
        """What the reading rank says, on all ranks of its model; raises on all of them if that is what stopped it."""
        if self.shared:
            if self.mesh.pipeline.is_first:
                said = broadcast_object(said, self.mesh.tensor)
            said = broadcast_object(said, self.mesh.pipeline)
        if failed is not None:
            raise failed
        if isinstance(said, _Failure):
            raise said.told()
        return said

    def _share(self, outlines: Sequence[_Outline], own: Sequence[PairBatch]) -> list[PairBatch]:
        """The numbers: all small ones of the step in one piece, pictures by micro-batch and to the first stage only."""
        mesh, first = self.mesh, self.mesh.pipeline.is_first
        if self.reads:
            numbers = torch.cat([x.flatten() for batch in own for x in _numbers(batch)])
        else:
            size = sum(torch.Size(shape).numel() for outline in outlines for shape in outline.shapes)
            numbers = torch.empty(size, dtype=torch.int64, device=mesh.device)
        along: list[Group] = [mesh.tensor, mesh.pipeline] if first else [mesh.pipeline]
        for line in along:
            broadcast(numbers, line, 0, KIND)
        found, place = [], 0
        for number, outline in enumerate(outlines):
            parts = []
            for shape in outline.shapes:
                size = torch.Size(shape).numel()
                parts.append(numbers[place : place + size].view(shape))
                place += size
            side = outline.side if first or (self.pictures_at_end and mesh.pipeline.is_last) else 0
            images = (
                own[number].images
                if self.reads
                else torch.empty(outline.pairs, 3, side, side, dtype=torch.uint8, device=mesh.device)
            )
            if first:
                broadcast(images, mesh.tensor, 0, KIND)
            if self.pictures_at_end and first:
                send(images, mesh.pipeline.size - 1, mesh.pipeline, KIND)
            elif self.pictures_at_end and mesh.pipeline.is_last:
                receive(images, 0, mesh.pipeline, KIND)
            ids, mask, language, group, slot = parts
            about = outline.keys, outline.skipped, outline.other_language
            found.append(PairBatch(images, ids, mask, language, group, slot, *about))
        return found


def _numbers(batch: PairBatch) -> list[Tensor]:
    return [batch.ids, batch.mask, batch.language, batch.group, batch.slot]
