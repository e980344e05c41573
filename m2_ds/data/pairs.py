"""From places of the stream to batches: read, draw a caption, decode, vary, encode; what is unusable is replaced.

Shapes: B pairs of a micro-batch, C captions a picture, S image side.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from m2_ds.data import randomness
from m2_ds.data.batch import PairBatch, group_id
from m2_ds.data.cache import DiskCache
from m2_ds.data.config import DataConfig, SourceConfig
from m2_ds.data.image import PictureError, TrainTransform, decode
from m2_ds.data.order import Order
from m2_ds.data.reader import Split, open_dataset
from m2_ds.data.records import Record


class TextEncoder(Protocol):
    """What the stream needs of a tokenizer: texts to ids and mask, int64 [texts, L], L the longest text."""

    def encode(self, texts: list[str], /) -> tuple[Tensor, Tensor]: ...


class _Unusable(Exception):
    """A record that gives no pair: why, and which."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass
class _Pair:
    image: Tensor
    captions: list[str]
    languages: list[int]
    group: int
    key: str


class PairDataset(Dataset[PairBatch]):
    """Slots to micro-batches. Holds open files and caches, and travels to workers without them.

    Raises:
        ValueError: a source that is missing, empty, or without the languages; shares too small for the mixing window.
    """

    def __init__(self, config: DataConfig, tokenizer: TextEncoder, seed: int) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.languages = list(config.languages)
        self.names: list[str] = []
        self.digests: list[str] = []
        self.splits: list[Split] = []
        self.shares: list[dict[int, float]] = []
        disk = DiskCache(config.cache_folder, int(config.cache_gb * 1e9)) if config.cache_folder else None
        for number, source in enumerate(config.sources):
            dataset = open_dataset(source.path)
            split = dataset.split(source.split, config.row_group_cache_mb << 20, disk, config.read_ahead)
            self.shares.append(self._languages_of(number, source, split))
            self.names.append(dataset.name)
            self.digests.append(dataset.digest)
            self.splits.append(split)
        weights = [len(s) if c.weight is None else c.weight for c, s in zip(config.sources, self.splits)]
        self.order = Order(
            [split.index for split in self.splits],
            weights,
            seed=seed,
            window=config.mixing_window,
            groups=config.shuffle_groups,
            languages=self.shares if config.captions == "one" else None,
            names=self.languages,
        )
        self.transform = TrainTransform(config.augment, config.image_size, seed)
        self._forget()

    def _forget(self) -> None:
        self._pictures: dict[tuple[int, int], np.ndarray] = {}
        self._room = self.config.picture_cache_mb << 20
        self._announced: dict[int, tuple[int, int]] = {}  # of each source, the run whose row groups are being fetched

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_pictures", "_room", "_announced")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _languages_of(self, number: int, source: SourceConfig, split: Split) -> dict[int, float]:
        """Numbers and shares of the languages that a source is read in."""
        there = [language for language in self.languages if split.languages.get(language)]
        wanted = [*source.languages] or (self.languages if self.config.captions == "each" else there)
        if not wanted or not set(wanted) <= set(there):
            raise ValueError(
                f"sources.{number}: {source.path}, split {source.split!r}, has captions in "
                f"{sorted(split.languages)}, but {wanted or self.languages} "
                + ("are asked for" if not there or source.languages else "must all be there for captions: each")
            )
        shares = source.languages or self.config.languages
        return {self.languages.index(language): shares[language] for language in wanted}

    def close(self) -> None:
        """End reading ahead."""
        for split in self.splits:
            split.close()

    def source_names(self) -> list[str]:
        """Names of the sources for logs: the data sets', with split and number where those repeat."""
        names = self.names
        if len(set(names)) < len(names):
            names = [f"{name}:{source.split}" for name, source in zip(names, self.config.sources)]
        if len(set(names)) < len(names):
            names = [f"{name}:{number}" for number, name in enumerate(names)]
        return names

    def epochs(self, samples: int) -> dict[str, float]:
        """How many epochs of each source the first ``samples`` pairs of the stream hold."""
        seen = self.order.seen(samples)
        return {name: pairs / len(split) for name, pairs, split in zip(self.source_names(), seen, self.splits)}

    def state(self, samples: int) -> dict[str, Any]:
        """Where the stream stands after ``samples`` pairs, for a checkpoint: all of it follows from seed and samples.

        By source: ``pairs`` taken of it, ``epochs`` they make, ``manifest`` the SHA-256 that tells its content.
        """
        pairs, epochs = self.order.seen(samples), self.epochs(samples)
        return {
            "seed": self.seed,
            "samples": samples,
            "sources": [
                {
                    "name": name,
                    "split": source.split,
                    "rows": len(split),
                    "pairs": taken,
                    "epochs": epochs[name],
                    "manifest": digest,
                }
                for name, source, split, taken, digest in zip(
                    self.source_names(), self.config.sources, self.splits, pairs, self.digests
                )
            ],
        }

    def __getitems__(self, slots: list[int]) -> list[PairBatch]:
        """The micro-batch of these slots, in a list of one (torch collates lists).

        Raises:
            ValueError: a pair for which no substitute could be used; names the records, files and reasons.
        """
        slot = np.asarray(slots, dtype=np.int64)
        self._read_ahead(slot)
        places = self.order(slot)
        draws = self.transform.draws(slot)
        # Column 0 draws the language where there is a choice, column 1 + l the caption of language l.
        columns = np.arange(1 + len(self.languages))
        chances = randomness.uniform(self.seed, randomness.CAPTION, slot[:, None], columns[None]).tolist()
        counts: Counter[str] = Counter()
        records: list[Record | None] = [None] * len(slots)
        for source in np.unique(places.source).tolist():
            mine = np.flatnonzero(places.source == source)
            for index, record in zip(mine.tolist(), self.splits[source].read(places.row[mine].tolist())):
                records[index] = record
        images = torch.empty(len(slots), 3, self.config.image_size, self.config.image_size, dtype=torch.uint8)
        pairs = []
        other = 0
        for index, record in enumerate(records):
            assert record is not None
            source, row, language = (int(x[index]) for x in (places.source, places.row, places.language))
            pair = self._pair(slots[index], source, row, language, record, draws[index], chances[index], counts)
            other += self.config.captions == "one" and pair.languages != [language]
            images[index] = pair.image
            pairs.append(pair)
        self.transform.finish(images, draws)
        captions = len(pairs[0].captions)
        ids, mask = self.tokenizer.encode([pair.captions[c] for c in range(captions) for pair in pairs])
        batch = PairBatch(
            images=images,
            ids=ids.view(captions, len(pairs), -1),
            mask=mask.view(captions, len(pairs), -1),
            language=torch.tensor([pair.languages for pair in pairs]).T.contiguous(),
            group=torch.tensor([pair.group for pair in pairs]),
            slot=torch.from_numpy(slot),
            keys=[pair.key for pair in pairs],
            skipped=dict(counts),
            other_language=other,
        )
        return [batch]

    def _read_ahead(self, slot: np.ndarray) -> None:
        """Of object stores: as a run of row groups begins, have it and the next one fetched."""
        if not any(split.read_ahead for split in self.splits):
            return
        of, position, _ = self.order.positions(slot)
        for source in np.unique(of).tolist():
            if self.splits[source].read_ahead:
                order = self.order.sources[source]
                run = order.run_at(int(position[of == source].max()))
                if self._announced.get(source) != run:
                    self._announced[source] = run
                    self.splits[source].ahead(order.groups_from(*run))

    def _pair(
        self,
        slot: int,
        source: int,
        row: int,
        language: int,
        record: Record,
        draw: np.ndarray,
        chances: list[float],
        counts: Counter[str],
    ) -> _Pair:
        """The pair of a slot, or of its first usable substitute: rows hashed from (seed, slot, attempt)."""
        failures = []
        split = self.splits[source]
        for attempt in range(self.config.max_attempts + 1):
            if attempt:
                row = int(randomness.hashed(self.seed, randomness.SUBSTITUTE, slot, attempt)) % len(split)
                (record,) = split.read([row])
            try:
                texts, languages = self._captions(source, language, record, chances)
                return _Pair(
                    image=self.transform.geometry(self._pixels(source, row, record, draw), draw),
                    captions=texts,
                    languages=languages,
                    group=group_id(self.names[source], record.group),
                    key=record.key,
                )
            except _Unusable as error:
                counts[error.reason] += 1
                failures.append(f"{record.key} in {split.file_of(row)}: {error}")
        raise ValueError(
            f"slot {slot}: no usable pair in {len(failures)} tries; check the data set (`m2 data verify`) or raise "
            "data.max_attempts:\n" + "\n".join(failures)
        )

    def _pixels(self, source: int, row: int, record: Record, draw: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3], from the cache or decoded: in full if it will be kept, else as small as will do."""
        kept = self._pictures.get((source, row))
        if kept is not None:
            return kept
        keep = 3 * record.width * record.height <= self._room
        try:
            scale = None if keep else self.transform.scale(draw)
            pixels = np.array(decode(record.image, scale, max_pixels=self.config.max_pixels))
        except PictureError as error:
            raise _Unusable(error.reason, str(error)) from None
        if keep and pixels.nbytes <= self._room:
            self._pictures[source, row] = pixels
            self._room -= pixels.nbytes
        return pixels

    def _captions(
        self, source: int, language: int, record: Record, chances: list[float]
    ) -> tuple[list[str], list[int]]:
        """(texts, language numbers) of a record: one of ``language``, else of another that it has; or one of each."""
        factors, shares = self.config.sources[source].caption_kinds, self.shares[source]
        choices: dict[str, list[tuple[str, float]]] = {self.languages[number]: [] for number in shares}
        for caption in record.captions:
            weight = caption.weight * factors.get(caption.kind, 1.0)
            if weight > 0 and caption.language in choices and caption.text.strip():
                choices[caption.language].append((caption.text, weight))
        there = [number for number in shares if choices[self.languages[number]]]
        if self.config.captions == "one" and there:
            there = [language] if language in there else [there[_drawn([shares[n] for n in there], chances[0])]]
        elif len(there) < len(shares):
            missing = [name for name, texts in choices.items() if not texts]
            raise _Unusable("no caption", f"no caption in {', '.join(missing)}")
        texts = []
        for number in there:
            candidates = choices[self.languages[number]]
            chosen = _drawn([weight for _, weight in candidates], chances[1 + number]) if len(candidates) > 1 else 0
            texts.append(candidates[chosen][0])
        return texts, there


def _drawn(weights: list[float], u: float) -> int:
    """The index on which u in [0, 1) falls when the weights are laid side by side."""
    point = u * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return len(weights) - 1
