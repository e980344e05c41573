"""From other people's formats to shards: every record is tried, and what can't be used is counted and named."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from m2_ds.data.decode import PictureError, decode
from m2_ds.data.reader import open_dataset
from m2_ds.data.records import Record
from m2_ds.data.shards import Dataset, ShardWriter
from m2_ds.data.sources.captions import FieldError, read_captions, read_negatives
from m2_ds.data.sources.inspect import show_counts
from m2_ds.data.sources.spread import spread
from m2_ds.files import publish

SKIPPED_FILE = "skipped.jsonl"


@dataclass
class Candidate:
    """One record of another format, before it is known to be of use."""

    file: str
    name: str
    split: str
    key: str
    image: bytes | Path | None = None
    captions: Any = None
    fields: dict[str, Any] = field(default_factory=dict)
    trouble: tuple[str, str] | None = None


@dataclass(frozen=True)
class Skip:
    """Why a record was left out: where it is, one of few reasons, and the particulars."""

    file: str
    record: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Defaults:
    """What records that do not say themselves get."""

    language: str | None
    source: str
    license: str
    max_pixels: int


def examine(candidate: Candidate, defaults: Defaults) -> tuple[str, Record] | Skip:
    """(split, record), the picture decoded once in full to be sure, or why not."""

    def skip(reason: str, detail: str) -> Skip:
        return Skip(candidate.file, candidate.name, reason, detail)

    if candidate.trouble is not None:
        return skip(*candidate.trouble)
    try:
        captions = read_captions(candidate.captions, defaults.language)
        negatives = read_negatives(candidate.fields.get("hard_negatives"))
    except FieldError as error:
        return skip(error.reason, str(error))
    image = candidate.image
    if isinstance(image, Path):
        try:
            image = image.read_bytes()
        except OSError as error:
            return skip("missing picture", str(error))
    if not image:
        return skip("missing picture", "the record has no picture")
    try:
        picture = decode(image, max_pixels=defaults.max_pixels)
    except PictureError as error:
        return skip(error.reason, str(error))
    fields = candidate.fields
    category = fields.get("category")
    record = Record(
        key=candidate.key,
        image=image,
        captions=captions,
        group=str(fields.get("group") or candidate.key),
        source=str(fields.get("source") or defaults.source),
        license=str(fields.get("license") or defaults.license),
        width=picture.width,
        height=picture.height,
        hard_negatives=negatives,
        category=None if category is None else str(category),
    )
    return candidate.split, record


def write(
    out: Path,
    candidates: Iterable[Candidate],
    what: str,
    *,
    name: str | None,
    defaults: Defaults,
    workers: int | None,
    overwrite: bool,
    total: int | None = None,
) -> Dataset:
    """Shards from candidates, with skipped.jsonl beside the manifest, and the counts printed.

    Raises:
        ValueError: not one record could be used; says why.
    """
    reasons: Counter[str] = Counter()
    used = 0
    aside = out / f".{SKIPPED_FILE}.part"
    with ShardWriter(out, name or out.name, overwrite=overwrite) as writer, open(aside, "w", encoding="utf-8") as log:
        for result in spread(
            partial(examine, defaults=defaults), candidates, what, workers=workers, chunk=32, total=total
        ):
            if not isinstance(result, Skip):
                try:
                    writer.add(*result)
                    used += 1
                    continue
                except ValueError as error:
                    result = Skip(result[0], result[1].key, "bad fields", str(error))
            reasons[result.reason] += 1
            log.write(json.dumps(vars(result), ensure_ascii=False) + "\n")
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())
        if not used:
            raise ValueError(f"not one record could be used ({counts or 'there was none'}); see {aside}")
        log.flush()
        publish(aside, out / SKIPPED_FILE)
    dataset = open_dataset(out)
    show_counts(dataset)
    print(f"records used: {used:,}; left out: {reasons.total():,}" + (f" ({counts})" if counts else ""))
    if reasons:
        print(f"what was left out and why: {out / SKIPPED_FILE}")
    return dataset


def by_split(arguments: tuple[str, ...]) -> list[tuple[str, str]]:
    """("train", "x") for "x", ("val", "x") for "val=x".

    Raises:
        ValueError: none given.
    """
    if not arguments:
        raise ValueError("no files given; name them as PATH or SPLIT=PATH")
    pairs = []
    for argument in arguments:
        split, equals, path = argument.partition("=")
        pairs.append((split, path) if equals and split.isidentifier() else ("train", argument))
    return pairs
