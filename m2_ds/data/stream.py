"""The stream of training pairs: global batches that are a pure function of (seed, step), whoever reads them.

Rank r of R takes the slots [r * b, (r + 1) * b) of every step's global batch, b = global_batch / R; workers make whole
micro-batches. So the pairs of a step are the same for any R and any number of workers, and a run goes on anywhere by
its step number alone. A pair that can't be used is replaced by a substitute; the others keep their places.

Shapes: B pairs of a micro-batch, C captions a picture, L tokens of the longest caption, S image side.
"""

import contextlib
import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m2_ds.data import randomness
from m2_ds.data.config import DataConfig
from m2_ds.data.image import PictureError, TrainTransform, decode
from m2_ds.data.memory import keep_freed_memory
from m2_ds.data.order import Order
from m2_ds.data.reader import Split, open_dataset
from m2_ds.data.records import Record


class TextEncoder(Protocol):
    """What the stream needs of a tokenizer: texts to ids and mask, int64 [texts, L], L the longest text."""

    def encode(self, texts: list[str], /) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class PairBatch:
    """Pictures with their captions.

    images uint8 [B, 3, S, S]; ids, mask int64 [C, B, L]; language int64 [C, B], index into the configured languages;
    group int64 [B], equal for pictures of the same thing; slot int64 [B]; keys of the records; skipped: pairs replaced,
    by reason.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    language: Tensor
    group: Tensor
    slot: Tensor
    keys: list[str]
    skipped: dict[str, int]

    def _each(self, change: Any) -> "PairBatch":
        names = ("images", "ids", "mask", "language", "group", "slot")
        return replace(self, **{name: change(getattr(self, name)) for name in names})

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


def group_id(dataset: str, group: str) -> int:
    """A stable 63-bit number of a group. Groups of different data sets are different things."""
    return int.from_bytes(hashlib.blake2b(f"{dataset}\0{group}".encode(), digest_size=8).digest()) >> 1


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
    """Slots to micro-batches. Holds open files and caches, and travels to workers without them."""

    def __init__(self, config: DataConfig, tokenizer: TextEncoder, seed: int) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.languages = list(config.languages)
        self.shares = list(config.languages.values())
        self.names: list[str] = []
        self.splits: list[Split] = []
        for number, source in enumerate(config.sources):
            dataset = open_dataset(source.path)
            split = dataset.split(source.split, config.row_group_cache_mb << 20)
            there = [language for language in self.languages if split.languages.get(language)]
            if not there or (config.captions == "each" and there != self.languages):
                raise ValueError(
                    f"sources.{number}: {source.path}, split {source.split!r}, has captions in "
                    f"{sorted(split.languages)}, but {self.languages} "
                    + ("must all be there for captions: each" if there else "are asked for")
                )
            self.names.append(dataset.name)
            self.splits.append(split)
        weights = [len(s) if c.weight is None else c.weight for c, s in zip(config.sources, self.splits)]
        self.order = Order(
            [split.group_sizes for split in self.splits],
            weights,
            seed=seed,
            window=config.mixing_window,
            groups=config.shuffle_groups,
        )
        self.transform = TrainTransform(config.augment, config.image_size, seed)
        self._pictures: dict[tuple[int, int], np.ndarray] = {}
        self._room = config.picture_cache_mb << 20

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pictures": {}, "_room": self.config.picture_cache_mb << 20}

    def __getitems__(self, slots: list[int]) -> list[PairBatch]:
        """The micro-batch of these slots, in a list of one (torch collates lists).

        Raises:
            ValueError: a pair for which no substitute could be used; names the records, files and reasons.
        """
        slot = np.asarray(slots, dtype=np.int64)
        places = self.order(slot)
        draws = self.transform.draws(slot)
        # Column 0 draws the language, column 1 + l the caption of language l.
        columns = np.arange(1 + len(self.languages))
        chances = randomness.uniform(self.seed, randomness.CAPTION, slot[:, None], columns[None]).tolist()
        skipped: Counter[str] = Counter()
        records: list[Record | None] = [None] * len(slots)
        for source in np.unique(places.source).tolist():
            mine = np.flatnonzero(places.source == source)
            for index, record in zip(mine.tolist(), self.splits[source].read(places.row[mine].tolist())):
                records[index] = record
        images = torch.empty(len(slots), 3, self.config.image_size, self.config.image_size, dtype=torch.uint8)
        pairs = []
        for index, record in enumerate(records):
            assert record is not None
            source, row = int(places.source[index]), int(places.row[index])
            pairs.append(self._pair(slots[index], source, row, record, draws[index], chances[index], skipped))
            images[index] = pairs[-1].image
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
            skipped=dict(skipped),
        )
        return [batch]

    def _pair(
        self,
        slot: int,
        source: int,
        row: int,
        record: Record,
        draw: np.ndarray,
        chances: list[float],
        skipped: Counter[str],
    ) -> _Pair:
        """The pair of a slot, or of its first usable substitute: rows hashed from (seed, slot, attempt)."""
        failures = []
        split = self.splits[source]
        for attempt in range(self.config.max_attempts + 1):
            if attempt:
                row = int(randomness.hashed(self.seed, randomness.SUBSTITUTE, slot, attempt)) % len(split)
                (record,) = split.read([row])
            try:
                texts, languages = self._captions(source, record, chances)
                return _Pair(
                    image=self.transform.geometry(self._pixels(source, row, record, draw), draw),
                    captions=texts,
                    languages=languages,
                    group=group_id(self.names[source], record.group),
                    key=record.key,
                )
            except _Unusable as error:
                skipped[error.reason] += 1
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

    def _captions(self, source: int, record: Record, chances: list[float]) -> tuple[list[str], list[int]]:
        """(texts, language numbers) of a record: one of a drawn language, or one of each."""
        factors = self.config.sources[source].caption_kinds
        choices: dict[str, list[tuple[str, float]]] = {language: [] for language in self.languages}
        for caption in record.captions:
            weight = caption.weight * factors.get(caption.kind, 1.0)
            if weight > 0 and caption.language in choices and caption.text.strip():
                choices[caption.language].append((caption.text, weight))
        there = [number for number, language in enumerate(self.languages) if choices[language]]
        if self.config.captions == "one" and there:
            there = [there[_drawn([self.shares[number] for number in there], chances[0])]]
        elif len(there) < len(self.languages):
            missing = [language for language in self.languages if not choices[language]]
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


def _only(batches: list[PairBatch]) -> PairBatch:
    return batches[0]


def _start_worker(_: int) -> None:
    import pyarrow

    # Several workers share the cores: a pool of threads in each would fight the training process.
    torch.set_num_threads(1)
    keep_freed_memory()
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)


class _Slots:
    """The slots of one micro-batch after another, without end."""

    def __init__(self, global_batch: int, micro_batch: int, accumulation: int, first: int, start_step: int) -> None:
        self.global_batch, self.micro_batch, self.accumulation = global_batch, micro_batch, accumulation
        self.first, self.start_step = first, start_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            for micro in range(self.accumulation):
                first = step * self.global_batch + self.first + micro * self.micro_batch
                yield list(range(first, first + self.micro_batch))
            step += 1


class Loader:
    """Iterates over this rank's micro-batches from `start_step` on, without end. Made by `build_loader`."""

    def __init__(self, dataset: PairDataset, slots: _Slots, *, workers: int, prefetch: int, pin_memory: bool) -> None:
        self.dataset, self.slots = dataset, slots
        self.workers, self.prefetch, self.pin_memory = workers, prefetch, pin_memory

    def __iter__(self) -> Iterator[PairBatch]:
        return self._from_workers() if self.workers else self._from_thread()

    def _from_workers(self) -> Iterator[PairBatch]:
        # A forked copy of a process with running threads may hang; the fork server has none, and imports torch once.
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["m2_ds.data.stream", "m2_ds.data.text"])
        yield from DataLoader(
            self.dataset,
            batch_sampler=self.slots,  # type: ignore[arg-type]
            collate_fn=_only,
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            pin_memory=self.pin_memory,
            multiprocessing_context=context,
            worker_init_fn=_start_worker,
        )

    def _from_thread(self) -> Iterator[PairBatch]:
        made: queue.Queue[PairBatch | BaseException] = queue.Queue(self.prefetch)
        stop = threading.Event()

        def put(item: PairBatch | BaseException) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    made.put(item, timeout=0.1)
                    return

        def work() -> None:
            keep_freed_memory()
            try:
                for slots in self.slots:
                    if stop.is_set():
                        return
                    batch = _only(self.dataset.__getitems__(slots))
                    put(batch.pin_memory() if self.pin_memory else batch)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="m2-loader", daemon=True)
        thread.start()
        try:
            while True:
                item = made.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()


def build_loader(
    config: DataConfig,
    tokenizer: TextEncoder,
    *,
    global_batch: int,
    micro_batch: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
) -> Loader:
    """The stream as one rank sees it: `accumulation` micro-batches a step, from `start_step` on, without end.

    Args:
        global_batch: pairs a step over all ranks; equals micro_batch * accumulation * world_size.

    Raises:
        ValueError: sizes that do not fit together; a source that is missing, empty, or without the languages.
    """
    if global_batch != micro_batch * accumulation * world_size:
        raise ValueError(
            f"global_batch {global_batch} is not micro_batch {micro_batch} x accumulation {accumulation} x "
            f"{world_size} ranks"
        )
    if not 0 <= rank < world_size or start_step < 0:
        raise ValueError(f"rank {rank} of {world_size}, start_step {start_step}: out of range")
    dataset = PairDataset(config, tokenizer, seed)
    slots = _Slots(global_batch, micro_batch, accumulation, rank * micro_batch * accumulation, start_step)
    return Loader(
        dataset,
        slots,
        workers=config.workers,
        prefetch=config.prefetch,
        pin_memory=torch.cuda.is_available(),
    )
