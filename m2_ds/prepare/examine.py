"""The first step: a unit of input through the rules that need no other record, in one pass over its pictures."""

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from m2_ds.data.memory import keep_freed_memory
from m2_ds.prepare import evaluation_sets
from m2_ds.prepare.fetch import fetch_pictures, local_file
from m2_ds.prepare.pairs import (
    CANDIDATES,
    DROPPED,
    Drop,
    Ledger,
    Pair,
    caption_row,
    draw,
    dropped_rows,
    record_row,
)
from m2_ds.prepare.picture import SIDE, Examined, mean_colours, perceptual_hashes
from m2_ds.prepare.picture import examine as examine_picture
from m2_ds.prepare.readers import BrokenShard, read_unit
from m2_ds.prepare.samples import Samples
from m2_ds.prepare.text import TextRules
from m2_ds.prepare.work import Job, TableFile, Unit

STEP = "examine"
BATCH = 128  # pairs in memory at a time
BATCH_BYTES = 32 << 20


def examine(job: Job, unit: Unit) -> dict[str, Any]:
    """NUMBER.parquet: candidates; NUMBER.dropped.parquet: what was left out; NUMBER.json: counts and samples.

    Raises:
        ValueError: the file is missing and skip_broken_shards is false.
    """
    keep_freed_memory()
    retries = job.config.work.retries
    for attempt in range(retries + 1):
        try:
            return _Examination(job, unit).run(attempt < retries)
        except _Again:
            time.sleep(min(10.0, 0.5 * 2.0**attempt))
    raise AssertionError("the last attempt raises or returns")


class _Again(Exception):
    """Reading failed in a way that another attempt may mend."""


class _Examination:
    def __init__(self, job: Job, unit: Unit) -> None:
        self.job, self.unit, self.config = job, unit, job.config
        self.ledger = Ledger()
        self.samples = Samples(job.samples_of(unit.number))
        self.text = TextRules(self.config.text)
        self.evaluation = evaluation_sets.opened(job) if self.config.evaluation_sets.paths else None
        self.rows = 0
        self.bytes = 0
        self.dropped: list[dict[str, Any]] = []

    def run(self, may_try_again: bool) -> dict[str, Any]:
        job, unit, ledger = self.job, self.unit, self.ledger
        with (
            TableFile(job.path(STEP, unit.number, "parquet"), CANDIDATES) as candidates,
            TableFile(job.path(STEP, unit.number, "dropped.parquet"), DROPPED) as dropped,
        ):
            try:
                with local_file(unit.file, self.config.work.retries) as path:
                    for batch in self._batches(read_unit(unit, path, self.config)):
                        candidates.write(self._examine(batch))
                        if len(self.dropped) >= 1000:
                            dropped.write(dropped_rows(self.dropped))
                            self.dropped = []
            except FileNotFoundError as error:
                if not self.config.skip_broken_shards:
                    raise ValueError(
                        f"{unit.file} is not there any more ({error}); put it back and run the same command again, or "
                        "set skip_broken_shards: true to go on without"
                    ) from error
                ledger.broken.append([unit.file, "no such file"])
            except BrokenShard as error:
                if error.again and may_try_again:
                    raise _Again from error
                ledger.broken.append([unit.file, f"after {ledger.read.total():,} records: {error}"])
            dropped.write(dropped_rows(self.dropped))
        content = {
            "ledger": ledger.to_json(),
            "samples": self.samples.to_json(),
            "rows": self.rows,
            "bytes": self.bytes,
            "unit": asdict(unit),
        }
        job.finish(STEP, unit.number, content)
        return content

    def _batches(self, pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
        """Batches bounded in records and bytes."""
        batch: list[Pair] = []
        held = 0
        source = iter(pairs)
        while True:
            start = time.thread_time()
            try:
                pair = next(source, None)
            except BrokenShard:
                yield batch  # what came before the damage counts
                raise
            finally:
                self.ledger.seconds["read"] += time.thread_time() - start  # type: ignore[assignment]
            if pair is None:
                break
            self.ledger.read[pair.source] += 1
            self.ledger.captions_read[pair.source] += len(pair.captions)
            held += _size(pair)
            batch.append(pair)
            if len(batch) == BATCH or held > BATCH_BYTES:
                yield batch
                batch, held = [], 0
        yield batch

    def _drop(self, pair: Pair, drop: Drop) -> None:
        self.ledger.drop_record(pair, drop.rule)
        self.dropped.append(record_row(pair, drop))
        picture = pair.image if isinstance(pair.image, bytes) else None
        self.samples.offer(drop.rule, pair.key, picture, pair.captions, drop.detail)

    def _drop_captions(self, pair: Pair, drops: Iterable[tuple[Any, Drop]]) -> None:
        for caption, drop in drops:
            self.ledger.dropped["caption", drop.rule, pair.source, caption.language] += 1
            self.dropped.append(caption_row(pair, caption, drop))

    def _timed(self, stage: str, pairs: list[Pair]) -> list[Pair]:
        """One stage over the pairs that are still there; those with a `drop` afterwards are counted and taken out."""
        start = time.thread_time()
        getattr(self, f"_{stage}")(pairs)
        kept = []
        for pair in pairs:
            if pair.drop is None:
                kept.append(pair)
            else:
                self._drop(pair, pair.drop)
        self.ledger.seconds[stage] += time.thread_time() - start  # type: ignore[assignment]
        return kept

    def _examine(self, pairs: list[Pair]) -> pa.Table:
        for stage in ("columns", "captions", "bytes", "pictures"):
            pairs = self._timed(stage, pairs)
        start = time.thread_time()
        table = self._signatures(pairs)
        self.ledger.seconds["signatures"] += time.thread_time() - start  # type: ignore[assignment]
        return table

    def _columns(self, pairs: list[Pair]) -> None:
        for pair, column in itertools.product(pairs, self.config.columns):
            value = pair.numbers.get(column.field)
            if value is None:
                if column.missing == "drop":
                    pair.drop = pair.drop or Drop(column.rule, f"no number in {column.field}")
            elif (column.min is not None and value < column.min) or (column.max is not None and value > column.max):
                pair.drop = pair.drop or Drop(column.rule, f"{column.field} is {value:g}")

    def _captions(self, pairs: list[Pair]) -> None:
        for pair in pairs:
            kept, drops = self.text.apply(pair.captions)
            if self.evaluation is not None and self.evaluation.texts:
                taken = [c for c in kept if evaluation_sets.text_digest(c.text) in self.evaluation.texts]
                drops += [(c, Drop("evaluation_caption", "is one of an evaluation set's")) for c in taken]
                kept = [caption for caption in kept if caption not in taken]
            if kept:
                pair.captions = kept
                self._drop_captions(pair, drops)
            else:
                # The record goes with its captions, under the rule of its first one.
                pair.captions = [caption for caption, _ in drops]
                pair.drop = drops[0][1]

    def _bytes(self, pairs: list[Pair]) -> None:
        """Pictures into memory, from files or URLs."""
        for pair in pairs:
            if isinstance(pair.image, Path):
                pair.image, pair.drop = _read_picture(pair.image, self.config.picture.max_bytes)
            elif pair.image is None and (pair.url is None or self.config.fetch is None):
                why = "the record has none" if pair.url is None else "it has a URL only; set `fetch` to download it"
                pair.drop = Drop("missing_picture", why)
        wanted = [pair for pair in pairs if pair.drop is None and pair.image is None]
        if wanted and self.config.fetch is not None:
            urls = [pair.url or "" for pair in wanted]
            for pair, found in zip(wanted, fetch_pictures(urls, self.config.fetch, self.config.picture.max_bytes)):
                if isinstance(found, Drop):
                    pair.drop = found
                else:
                    pair.image = found

    def _pictures(self, pairs: list[Pair]) -> None:
        examined: list[tuple[Pair, Examined]] = []
        for pair in pairs:
            assert isinstance(pair.image, bytes)
            result = examine_picture(pair.image, self.config.picture)
            if isinstance(result, Drop):
                pair.drop = result
                continue
            pair.sha256 = evaluation_sets.digest(pair.image)
            pair.width, pair.height, pair.image = result.width, result.height, result.image
            examined.append((pair, result))
        thumbnails = np.array([result.thumbnail for _, result in examined], dtype=np.uint8).reshape(-1, SIDE, SIDE, 3)
        self.phash, self.colours = perceptual_hashes(thumbnails), mean_colours(thumbnails)
        if self.evaluation is not None:
            near = self.evaluation.index.near(self.phash, self.colours)
            for (pair, _), other in zip(examined, near):
                if pair.sha256 in self.evaluation.index.digests:
                    pair.drop = Drop("evaluation_picture", "equal bytes in an evaluation set")
                elif other >= 0:
                    pair.drop = Drop("evaluation_near_picture", f"looks like {self.evaluation.names[int(other)]}")
        left = [place for place, (pair, _) in enumerate(examined) if pair.drop is None]
        self.phash, self.colours = self.phash[left], self.colours[left]

    def _signatures(self, pairs: list[Pair]) -> pa.Table:
        columns: dict[str, Any] = {
            name: [getattr(pair, name) for pair in pairs]
            for name in ("key", "image", "width", "height", "group", "category", "source", "license", "sha256")
        }
        columns["captions"] = [[asdict(caption) for caption in pair.captions] for pair in pairs]
        columns["hard_negatives"] = [[asdict(n) for n in pair.negatives] or None for pair in pairs]
        columns["phash"], columns["colours"] = self.phash, [row.tobytes() for row in self.colours]
        columns["draw"] = np.array([draw(pair.key) for pair in pairs], dtype=np.uint64)
        self.rows += len(pairs)
        self.bytes += sum(len(pair.image) for pair in pairs if isinstance(pair.image, bytes))
        return pa.table(columns, schema=CANDIDATES)


def _size(pair: Pair) -> int:
    """About how many bytes a pair's picture will take."""
    if isinstance(pair.image, bytes):
        return len(pair.image)
    with contextlib.suppress(OSError, ValueError):
        if pair.image is not None:
            return pair.image.stat().st_size
    return 1 << 18 if pair.url else 0


def _read_picture(path: Path, max_bytes: int) -> tuple[bytes | None, Drop | None]:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            return None, Drop("too_many_bytes", f"{path}: {size:,} bytes")
        return path.read_bytes(), None
    except (OSError, ValueError) as error:
        return None, Drop("missing_picture", f"{path}: {error}")
