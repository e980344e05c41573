"""Pictures and captions in one sequence: how well captions fit by the words that the model tells, and which it tells.

For a model trained with loss.cmlm. Shapes: N pictures, U different texts, P (picture, text) pairs, L tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m2_ds.evaluation.batches import compute
from m2_ds.evaluation.embed import Processor
from m2_ds.evaluation.sources import Decode, Source
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.masked import caption_scores, told_words
from m2_ds.model.masking import word_numbers
from m2_ds.parallel.mesh import Group

GREY = 128


class Matching:
    """Pairs of one part of a task. ``rows``: of the source, by picture."""

    def __init__(
        self,
        model: Any,
        processor: Processor,
        source: Source,
        rows: Sequence[int],
        read_picture: Decode,
        batch_size: int,
        device: torch.device | str,
        threads: int,
        group: Group,
    ) -> None:
        """Raises ValueError for a model that cannot tell words."""
        if not isinstance(model, M2Encoder):
            raise ValueError(
                "a task that has words told (hidden_words, or hard_negatives with score: words) needs the whole model "
                "in one piece, and this one is cut into pipeline stages or exported: evaluate a checkpoint with "
                "m2 evaluate"
            )
        if not model.config.masked_text_head:
            raise ValueError(
                "a task that has words told (hidden_words, or hard_negatives with score: words) needs a model trained "
                "with loss.cmlm.weight above 0; this one has no head for it. Leave the task out, or set score: cosine"
            )
        tokenizer = getattr(processor, "tokenizer", None)
        assert tokenizer is not None  # `texts` would have said so
        self.model, self.processor, self.source, self.rows = model, processor, source, rows
        self.words, self.read_picture = tokenizer.words().to(device), read_picture
        self.batch_size, self.device, self.threads, self.group = batch_size, device, threads, group

    def scores(self, pairs: Sequence[tuple[int, str]], rounds: int, what: str) -> Tensor:
        """fp32 [P]: `caption_scores` of pairs (picture, text)."""

        def score(images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            return caption_scores(self.model, images, ids, mask, self.words, rounds)[:, None]

        return self._computed(pairs, score, what)[:, 0]

    def told(self, pairs: Sequence[tuple[int, str]], what: str) -> Tensor:
        """fp32 [P, 3]: how many words of each caption there are, are told, and are told from a grey picture."""
        most = None
        if self.group.size > 1:  # every rank runs as often as the others, whatever captions it got
            ids, mask = (x.to(self.device) for x in self.processor.texts([text for _, text in pairs]))
            most = int(word_numbers(ids, mask, self.words).max())

        def tell(images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            grey = torch.full_like(images, GREY)
            right, count = told_words(self.model, images, ids, mask, self.words, most)
            blind, _ = told_words(self.model, grey, ids, mask, self.words, most)
            return torch.stack([count, right, blind], dim=1)

        return self._computed(pairs, tell, what)

    def _computed(self, pairs: Sequence[tuple[int, str]], function: Any, what: str) -> Tensor:
        ids, mask = self.processor.texts([text for _, text in pairs])
        lengths = mask.sum(1)
        order = lengths.argsort(stable=True).tolist()  # texts of like length share a batch
        place = torch.empty(len(order), dtype=torch.int64)
        place[torch.tensor(order)] = torch.arange(len(order))

        def load(places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
            mine = [order[number] for number in places]
            wanted = sorted({pairs[pair][0] for pair in mine})
            records = self.source.read([self.rows[picture] for picture in wanted])
            images = self.processor.images([self.read_picture(record.image) for record in records])
            where = {picture: number for number, picture in enumerate(wanted)}
            longest = int(lengths[mine].max())
            return images[[where[pairs[pair][0]] for pair in mine]], ids[mine, :longest], mask[mine, :longest]

        def encode(loaded: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            images, ids, mask = (x.to(self.device) for x in loaded)
            found = function(images, ids, mask).float()
            return found, torch.zeros(len(found), dtype=torch.int64)

        batches = [range(i, min(i + self.batch_size, len(pairs))) for i in range(0, len(pairs), self.batch_size)]
        return compute(batches, load, encode, what=what, threads=self.threads, group=self.group).features[place]
