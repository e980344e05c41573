"""The stream of training pairs: global batches that are a pure function of (seed, slot), whoever reads them.

A step takes the next global_batch slots; rank r of R the r-th part of them, and workers make whole micro-batches. So
the pairs of a step are the same for any R and any number of workers, and a run goes on anywhere by the number of pairs
that it has seen. A pair that can't be used is replaced by a substitute; the others keep their places.
"""

import contextlib
import queue
import threading
from collections.abc import Collection, Iterator

import torch
from torch.utils.data import DataLoader

from m2_ds.data.batch import PairBatch, group_id
from m2_ds.data.config import DataConfig
from m2_ds.data.memory import keep_freed_memory
from m2_ds.data.pairs import PairDataset, TextEncoder

__all__ = ["Loader", "PairBatch", "PairDataset", "TextEncoder", "build_loader", "group_id"]


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

    def __init__(
        self, global_batch: int, micro_batch: int, accumulation: int, first: int, rank: int, left_out: Collection[int]
    ) -> None:
        """``first``: the job's first slot; ``left_out``: first slots of global batches that are passed over."""
        self.global_batch, self.micro_batch, self.accumulation = global_batch, micro_batch, accumulation
        self.first, self.own, self.left_out = first, rank * micro_batch * accumulation, left_out

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first
        while True:
            first = next_batch(first, self.global_batch, self.left_out)
            for micro in range(self.accumulation):
                start = first + self.own + micro * self.micro_batch
                yield list(range(start, start + self.micro_batch))
            first += self.global_batch


def next_batch(samples: int, global_batch: int, left_out: Collection[int]) -> int:
    """The first slot of the global batch that a run takes behind ``samples`` pairs: the next that is not left out."""
    while any(samples <= slot < samples + global_batch for slot in left_out):
        samples += global_batch
    return samples


class Loader:
    """Iterates over this rank's micro-batches from `start_sample` on, without end. Made by `build_loader`."""

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
            self.dataset.close()
            thread.join()


def build_loader(
    config: DataConfig,
    tokenizer: TextEncoder,
    *,
    global_batch: int,
    micro_batch: int,
    seed: int,
    start_sample: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    left_out: Collection[int] = (),
) -> Loader:
    """The stream as one rank sees it: `accumulation` micro-batches a step, without end.

    Args:
        global_batch: pairs a step over all ranks; equals micro_batch * accumulation * world_size.
        start_sample: pairs that the run has seen already; the first step takes those that come next.
        left_out: first slots of global batches that are passed over.

    Raises:
        ValueError: sizes that do not fit together; a source that is missing, empty, or without the languages.
    """
    if global_batch != micro_batch * accumulation * world_size:
        raise ValueError(
            f"global_batch {global_batch} is not micro_batch {micro_batch} x accumulation {accumulation} x "
            f"{world_size} ranks"
        )
    if not 0 <= rank < world_size or start_sample < 0:
        raise ValueError(f"rank {rank} of {world_size}, start_sample {start_sample}: out of range")
    dataset = PairDataset(config, tokenizer, seed)
    slots = _Slots(global_batch, micro_batch, accumulation, start_sample, rank, left_out)
    return Loader(
        dataset,
        slots,
        workers=config.workers,
        prefetch=config.prefetch,
        pin_memory=torch.cuda.is_available(),
    )
