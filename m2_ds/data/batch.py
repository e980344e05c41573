"""What the stream gives: pictures with their captions, as tensors.

Shapes: B pairs of a micro-batch, C captions a picture, L tokens of the longest caption, S image side.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairBatch:
    """Pictures with their captions.

    images uint8 [B, 3, S, S]; ids, mask int64 [C, B, L]; language int64 [C, B], index into the configured languages;
    group int64 [B], equal for pictures of the same thing; slot int64 [B]; keys of the records; skipped: pairs replaced,
    by reason; other_language: pairs whose caption is not in the language that their place asks for.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    language: Tensor
    group: Tensor
    slot: Tensor
    keys: list[str]
    skipped: dict[str, int]
    other_language: int = 0

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PairBatch":
        return replace(
            self,
            images=change(self.images),
            ids=change(self.ids),
            mask=change(self.mask),
            language=change(self.language),
            group=change(self.group),
            slot=change(self.slot),
        )

    def to(self, device: torch.device | str) -> "PairBatch":
        """The batch on a device; copies from pinned memory do not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PairBatch":
        """The batch in page-locked memory."""
        return self._each(lambda tensor: tensor.pin_memory())

    def padded(self, rows: int, group: int) -> "PairBatch":
        """The batch and ``rows`` rows that are no pairs: black pictures with captions of one token, in ``group``."""

        def fill(x: Tensor, dim: int, value: int = 0) -> Tensor:
            shape = [*x.shape[:dim], rows, *x.shape[dim + 1 :]]
            return torch.cat([x, x.new_full(shape, value)], dim=dim)

        mask = fill(self.mask, 1)
        mask[:, len(self.slot) :, 0] = 1
        return replace(
            self,
            images=fill(self.images, 0),
            ids=fill(self.ids, 1),
            mask=mask,
            language=fill(self.language, 1),
            group=fill(self.group, 0, group),
            slot=fill(self.slot, 0),
        )


def by_length(batches: Sequence[PairBatch], device: torch.device | str) -> list[PairBatch]:
    """The same pairs in as many micro-batches of the same sizes, on a device, short captions first.

    A micro-batch is as long as its longest caption, so that less padding is computed. Pairs of equal length keep their
    order. Batches come from the host, where their lengths are looked at.
    """
    lengths = torch.cat([batch.mask.sum(2).amax(0) for batch in batches])
    order = torch.argsort(lengths, stable=True)
    width = max(batch.ids.shape[2] for batch in batches)

    def wide(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[2]))

    ids = torch.cat([wide(batch.ids) for batch in batches], dim=1)
    mask = torch.cat([wide(batch.mask) for batch in batches], dim=1)
    language = torch.cat([batch.language for batch in batches], dim=1)
    group = torch.cat([batch.group for batch in batches])
    slot = torch.cat([batch.slot for batch in batches])
    images = torch.cat([batch.images.to(device, non_blocking=True) for batch in batches])
    keys = [key for batch in batches for key in batch.keys]
    found, first = [], 0
    for batch in batches:
        mine = order[first : first + len(batch.slot)]
        longest = int(lengths[mine].max())
        there = mine.to(device)
        own = PairBatch(
            images=images.index_select(0, there),
            ids=ids[:, mine, :longest].to(device),
            mask=mask[:, mine, :longest].to(device),
            language=language[:, mine].to(device),
            group=group[mine].to(device),
            slot=slot[mine].to(device),
            keys=[keys[number] for number in mine.tolist()],
            skipped=batch.skipped,
            other_language=batch.other_language,
        )
        found.append(own)
        first += len(mine)
    return found


def group_id(dataset: str, group: str) -> int:
    """A stable 63-bit number of a group. Groups of different data sets are different things."""
    return int.from_bytes(hashlib.blake2b(f"{dataset}\0{group}".encode(), digest_size=8).digest()) >> 1
