"""The last steps: what is left of consecutive units into parts, and the parts into one data set."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import yaml

from m2_ds.data.index import ShardIndex, write_index
from m2_ds.data.memory import keep_freed_memory
from m2_ds.data.reader import MANIFEST, index_info, open_dataset
from m2_ds.data.records import SCHEMA_VERSION, Count, Manifest, Record, ShardInfo, SplitInfo
from m2_ds.data.shards import ShardWriter, index_file
from m2_ds.files import sync, write_atomically
from m2_ds.prepare.config import OutputConfig, PrepareConfig
from m2_ds.prepare.pairs import (
    DROPPED,
    Drop,
    Ledger,
    Pair,
    caption_row,
    draw,
    dropped_rows,
    languages_of,
    record_row,
)
from m2_ds.prepare.samples import Samples
from m2_ds.prepare.score import needed
from m2_ds.prepare.survivors import Judged, Plan, Scored, judged
from m2_ds.prepare.work import Job, TableFile, Unit, open_table

STEP = "write"
KEPT = "kept"


class Part(NamedTuple):
    """Consecutive units that one task writes."""

    number: int
    dataset: str  # folder of the data set below `out`; "" is `out` itself
    units: list[Unit]


def parts_of(config: PrepareConfig, units: Sequence[Unit], sizes: Sequence[int]) -> list[Part]:
    """Units put together until a shard is full; `sizes` are the bytes that are left of each."""
    parts: list[Part] = []
    held: list[Unit] = []
    weight = 0
    apart = config.balance.how == "weights"

    def finish() -> None:
        if held:
            dataset = f"sets/{config.inputs[held[0].input].name}" if apart else ""
            parts.append(Part(len(parts), dataset, list(held)))
            held.clear()

    for unit, size in zip(units, sizes):
        if held and apart and held[-1].input != unit.input:
            finish()
            weight = 0
        held.append(unit)
        weight += size
        if weight >= config.output.shard_mb << 20:
            finish()
            weight = 0
    finish()
    return parts


def split_of(group: str, config: OutputConfig) -> str:
    """The split of a record, by the hash of its group: records that show the same thing are never apart."""
    place = draw(group, "split") / 2**64
    for name, share in config.splits.items():
        if place < share:
            return name
        place -= share
    return "train"


def write_part(job: Job, item: tuple[Part, Plan, dict[tuple[str, str], int] | None]) -> dict[str, Any]:
    """A data set of the part's own, NUMBER.dropped.parquet with all that its units lost, NUMBER.json with counts."""
    keep_freed_memory()
    part, plan, limits = item
    folder = job.path(STEP, part.number, "set")
    shutil.rmtree(folder, ignore_errors=True)
    writing = _Writing(limits, job.samples_of(part.number))
    output = job.config.output
    writer = ShardWriter(
        folder,
        "part",
        group_rows=output.group_rows,
        group_bytes=int(output.group_mb * (1 << 20)),
        shard_bytes=output.shard_mb << 20,
    )
    with writer, TableFile(job.path(STEP, part.number, "dropped.parquet"), DROPPED) as dropped:
        for unit in part.units:
            for batch in open_table(job.path("examine", unit.number, "dropped.parquet")).iter_batches():
                dropped.write(pa.Table.from_batches([batch]))
            scored = Scored(job, unit.number) if needed(job.config) else None
            for rows in judged(job, plan, unit.number, unit.file):
                for record in writing.records([scored.apply(row) if scored else row for row in rows]):
                    writer.add(split_of(record.group, output), record)
                dropped.write(dropped_rows(writing.take_dropped()))
    content = {"ledger": writing.ledger.to_json(), "samples": writing.samples.to_json(), "dataset": part.dataset}
    job.finish(STEP, part.number, content)
    # The pictures are in the shards now; from here on nobody needs the candidates.
    for unit in part.units:
        job.path("examine", unit.number, "parquet").unlink(missing_ok=True)
    return content


class _Writing:
    def __init__(self, limits: dict[tuple[str, str], int] | None, samples: int) -> None:
        self.limits = limits
        self.ledger = Ledger()
        self.samples = Samples(samples)
        self.dropped: list[dict[str, Any]] = []

    def take_dropped(self) -> list[dict[str, Any]]:
        rows, self.dropped = self.dropped, []
        return rows

    def records(self, rows: Sequence[Judged]) -> list[Record]:
        kept = []
        for judgement in rows:
            pair, ledger = judgement.pair, self.ledger
            for caption, why in judgement.drops:
                ledger.dropped["caption", why.rule, pair.source, caption.language] += 1
                self.dropped.append(caption_row(pair, caption, why))
            drop = pair.drop or self._beyond(pair, judgement.draw)
            if drop is not None:
                ledger.drop_record(pair, drop.rule)
                self.dropped.append(record_row(pair, drop))
                self._sample(drop.rule, pair, drop.detail)
                continue
            self._observe(pair)
            self._sample(KEPT, pair, "")
            kept.append(_record(pair))
        return kept

    def _beyond(self, pair: Pair, number: int) -> Drop | None:
        if self.limits is None:
            return None
        name = (pair.source, languages_of(pair.captions))
        return Drop("balance", " ".join(name)) if number > self.limits[name] else None

    def _sample(self, rule: str, pair: Pair, detail: str) -> None:
        assert isinstance(pair.image, bytes)
        self.samples.offer(rule, pair.key, pair.image, pair.captions, detail)

    def _observe(self, pair: Pair) -> None:
        ledger = self.ledger
        ledger.kept[pair.source, languages_of(pair.captions)] += 1
        for caption in pair.captions:
            ledger.captions_kept[pair.source, caption.language] += 1
            characters = len(caption.text) - caption.text.count(" ")
            ledger.observe("caption length, characters", caption.language, characters)
        short, long = sorted((pair.width, pair.height))
        ledger.observe("longer over shorter side", "", long / short)
        ledger.observe("shorter side, pixels", "", short)


def _record(pair: Pair) -> Record:
    assert isinstance(pair.image, bytes)
    return Record(
        key=pair.key,
        image=pair.image,
        captions=pair.captions,
        group=pair.group,
        source=pair.source,
        license=pair.license,
        width=pair.width,
        height=pair.height,
        hard_negatives=pair.negatives,
        category=pair.category,
    )


def publish_dataset(job: Job, parts: Sequence[Part]) -> list[Path]:
    """Move the parts' shards into place and write manifests; may be cut off and called again.

    Returns:
        Folders of the data sets.

    Raises:
        ValueError: nothing is left to write.
    """
    config = job.config
    folders = {}
    for dataset in dict.fromkeys(part.dataset for part in parts):
        folder = config.out / dataset
        folder.mkdir(parents=True, exist_ok=True)
        name = config.name or config.out.resolve().name
        some = [job.path(STEP, part.number, "set") for part in parts if part.dataset == dataset]
        if _join(folder, f"{name}-{folder.name}" if dataset else name, some):
            folders[dataset] = folder
    if not folders:
        raise ValueError(f"no record is left: see {config.out / 'card.html'} for what every rule took")
    dropped = config.out / "dropped"
    dropped.mkdir(exist_ok=True)
    for part in parts:
        _move(job.path(STEP, part.number, "dropped.parquet"), dropped / f"dropped-{part.number:05d}.parquet")
    sync(dropped)
    if config.balance.how == "weights":
        shares = config.balance.sources
        sources = [
            {"path": str(folder), "weight": shares[Path(dataset).name]}
            for dataset, folder in folders.items()
            if shares[Path(dataset).name] > 0
        ]
        block: dict[str, Any] = {"sources": sources}
        if config.balance.languages:
            block["languages"] = config.balance.languages
        write_atomically(config.out / "mixture.yaml", yaml.safe_dump({"data": block}, sort_keys=False).encode())
    return list(folders.values())


def _join(folder: Path, name: str, parts: list[Path]) -> bool:
    """One data set of parts in order; False if they hold nothing."""
    shards: dict[str, list[ShardInfo]] = {}
    splits: dict[str, list[SplitInfo]] = {}
    for part in parts:
        found = open_dataset(part)
        for split in found.splits:
            splits.setdefault(split, []).append(found.manifest.splits[split])
            mine = shards.setdefault(split, [])
            (folder / split).mkdir(exist_ok=True)
            for shard in found.index(split):
                file = f"{split}/{split}-{len(mine):05d}.parquet"
                _move(part / shard.file, folder / file)
                mine.append(shard.model_copy(update={"file": file}))
    if not shards:
        return False
    for split in shards:
        sync(folder / split)
    order = sorted(shards, key=lambda split: (split != "train", split))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        splits={split: _split_info(folder, split, shards[split], splits[split]) for split in order},
    )
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return True


def _split_info(folder: Path, split: str, shards: list[ShardInfo], infos: list[SplitInfo]) -> SplitInfo:
    content = write_index(shards)
    write_atomically(folder / index_file(split), content)
    languages, sources = Counter[str](), Counter[str]()
    pairs, captions = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for info in infos:
        languages.update(info.languages)
        sources.update(info.sources)
        for count in info.counts:
            pairs[count.source, count.language] += count.pairs
            captions[count.source, count.language] += count.captions
    return SplitInfo(
        rows=sum(info.rows for info in infos),
        languages=dict(sorted(languages.items())),
        sources=dict(sorted(sources.items())),
        counts=[
            Count(source=source, language=language, pairs=pairs[source, language], captions=number)
            for (source, language), number in sorted(captions.items())
        ],
        index=index_info(index_file(split), ShardIndex.of(shards), content),
    )


def _move(source: Path, target: Path) -> None:
    """Rename a file; one that an earlier, interrupted run moved is where it belongs already."""
    if source.exists():
        os.replace(source, target)
    elif not target.exists():
        raise ValueError(f"{source} is gone; start again with --restart")
