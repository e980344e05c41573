"""What travels between the steps of a preparation: pairs, the tables between steps, and the ledger of counts."""

import bisect
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from m2_ds.data.records import SCHEMA, Caption, HardNegative


class Drop(NamedTuple):
    """Why a record, or one caption of it, was left out."""

    rule: str
    detail: str


@dataclass(slots=True)
class Pair:
    """A record on its way. `image` is a path until it is read; `drop` says why it is left out, if it is."""

    key: str
    source: str
    license: str
    shard: str
    captions: list[Caption] = field(default_factory=list)
    image: bytes | Path | None = None
    url: str | None = None
    group: str = ""
    category: str | None = None
    negatives: list[HardNegative] = field(default_factory=list)
    numbers: dict[str, float | None] = field(default_factory=dict)
    raw: Any = None
    width: int = 0
    height: int = 0
    sha256: bytes = b""
    drop: Drop | None = None


# A caption that was left out while its record may stay: (caption, why).
CaptionDrops = list[tuple[Caption, Drop]]

# Candidates: what the next steps need beside the record itself. `draw` decides about down-sampling and samples.
SIGNATURES = pa.schema(
    [("sha256", pa.binary(16)), ("phash", pa.uint64()), ("colours", pa.binary(192)), ("draw", pa.uint64())]
)
CANDIDATES = pa.schema([*SCHEMA, *SIGNATURES])

DROPPED = pa.schema(
    [
        ("level", pa.string()),  # record, or caption: one of a record that may have been kept with others
        ("rule", pa.string()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("shard", pa.string()),  # input file
        ("language", pa.string()),
        ("detail", pa.string()),
        ("captions", pa.int32()),  # captions that went with a record
        ("text", pa.string()),  # the caption, or a record's first one
    ]
)


def draw(key: str, salt: str = "") -> int:
    """64 bits that stand for a key: the same on every machine, evenly spread."""
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{key}".encode(), digest_size=8).digest())


def languages_of(captions: Iterable[Caption]) -> str:
    """The languages of a record's captions as one word: en, zh, en+zh."""
    return "+".join(sorted({caption.language for caption in captions}))


# The histograms of the card: edges of the bins; values beyond the last edge fall into the last bin.
EDGES: dict[str, list[float]] = {
    "caption length, characters": [0, 2, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200, 400, 1000],
    "longer over shorter side": [1, 1.1, 1.25, 1.34, 1.5, 1.67, 1.78, 2, 2.34, 2.67, 3, 5],
    "shorter side, pixels": [0, 32, 64, 128, 192, 224, 256, 384, 512, 768, 1024, 2048, 4096],
    "similarity": [-1, 0, 0.05, 0.1, 0.15, 0.2, 0.22, 0.24, 0.26, 0.28, 0.3, 0.32, 0.35, 0.4, 0.5, 0.7, 1],
}


@dataclass
class Ledger:
    """Counts of one unit or of all: sums of ledgers are ledgers.

    records: read = kept + dropped of level record. captions: read + added = kept + dropped of level caption + those
    that went with a record (`gone`).
    """

    read: Counter[str] = field(default_factory=Counter)  # records by source
    captions_read: Counter[str] = field(default_factory=Counter)  # by source
    captions_added: Counter[str] = field(default_factory=Counter)  # by kind
    dropped: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)  # (level, rule, source, language)
    gone: Counter[str] = field(default_factory=Counter)  # captions that went with records, by rule
    kept: Counter[tuple[str, str]] = field(default_factory=Counter)  # records by (source, languages)
    captions_kept: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (source, language)
    histograms: dict[str, Counter[int]] = field(default_factory=dict)  # name, language -> bin -> count
    seconds: Counter[str] = field(default_factory=Counter)  # CPU time by stage
    broken: list[list[str]] = field(default_factory=list)  # [file, what is wrong]

    def add(self, other: "Ledger") -> None:
        for name, counts in vars(other).items():
            mine = getattr(self, name)
            if name == "broken":
                mine.extend(counts)
            elif name == "histograms":
                for key, bins in counts.items():
                    mine.setdefault(key, Counter()).update(bins)
            else:
                mine.update(counts)

    def drop_record(self, pair: Pair, rule: str) -> None:
        language = languages_of(pair.captions)
        self.dropped["record", rule, pair.source, language] += 1
        self.gone[rule] += len(pair.captions)

    def observe(self, name: str, language: str, value: float) -> None:
        place = max(0, bisect.bisect_right(EDGES[name], value) - 1)
        self.histograms.setdefault(f"{name}\t{language}", Counter())[place] += 1

    def balanced(self) -> bool:
        """Whether nothing was lost: what was read is what was kept and what was dropped."""
        records = sum(count for (level, *_), count in self.dropped.items() if level == "record")
        captions = sum(count for (level, *_), count in self.dropped.items() if level == "caption")
        return (
            self.read.total() == self.kept.total() + records
            and self.captions_read.total() + self.captions_added.total()
            == self.captions_kept.total() + captions + self.gone.total()
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; keys of several words are joined by tabs."""
        plain: dict[str, Any] = {}
        for name, counts in vars(self).items():
            if name == "histograms":
                plain[name] = {
                    key: {str(b): n for b, n in sorted(bins.items())} for key, bins in sorted(counts.items())
                }
            elif name == "broken":
                plain[name] = counts
            else:
                plain[name] = {k if isinstance(k, str) else "\t".join(k): n for k, n in sorted(counts.items())}
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Ledger":
        ledger = cls()
        for name, counts in plain.items():
            if name == "broken":
                ledger.broken = counts
            elif name == "histograms":
                ledger.histograms = {k: Counter({int(b): n for b, n in bins.items()}) for k, bins in counts.items()}
            elif name in ("dropped", "kept", "captions_kept"):
                getattr(ledger, name).update({tuple(key.split("\t")): n for key, n in counts.items()})
            else:
                getattr(ledger, name).update(counts)
        return ledger


def dropped_rows(rows: list[dict[str, Any]]) -> pa.Table:
    """The table of dropped records and captions; lone surrogates in what could not be read are shown as '?'."""
    text = {name for name in DROPPED.names if name != "captions"}
    return pa.Table.from_pylist(
        [
            {k: v.encode("utf-8", "replace").decode() if k in text and v is not None else v for k, v in row.items()}
            for row in rows
        ],
        schema=DROPPED,
    )


def record_row(pair: Pair, drop: Drop) -> dict[str, Any]:
    first = pair.captions[0].text if pair.captions else pair.raw if isinstance(pair.raw, str) else ""
    return {
        "level": "record", "rule": drop.rule, "key": pair.key, "source": pair.source, "shard": pair.shard,
        "language": languages_of(pair.captions), "detail": drop.detail[:300], "captions": len(pair.captions),
        "text": first[:500],
    }  # fmt: skip


def caption_row(pair: Pair, caption: Caption, drop: Drop) -> dict[str, Any]:
    return {
        "level": "caption", "rule": drop.rule, "key": pair.key, "source": pair.source, "shard": pair.shard,
        "language": caption.language, "detail": drop.detail[:300], "captions": 0, "text": caption.text[:500],
    }  # fmt: skip
