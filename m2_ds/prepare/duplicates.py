"""The rules that compare pictures, and keys, of all records: equal keys, equal bytes, pictures that look alike.

Each rule sees the records that the ones before it left. A record goes when an earlier one has what it has; earlier
means first in the input, or, for pictures with representative `largest`, of more pixels, then first. That an earlier
record may itself have gone by the same rule is no matter: the first of all stays, and the rule needs no second round.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from m2_ds.prepare.config import PrepareConfig
from m2_ds.prepare.exchange import DECISIONS, RECORD, SHIFT, Layout, Rule, gone_places
from m2_ds.prepare.neighbours import bands, earlier_twins
from m2_ds.prepare.picture import COLOURS
from m2_ds.prepare.work import Job, open_table

Array = np.ndarray
KEY, EXACT, NEAR = "duplicate_key", "duplicate_picture", "near_duplicate_picture"
_FOUND = pa.schema(
    [("place", pa.int64()), ("other_pixels", pa.int64()), ("other_place", pa.int64()), ("other", pa.string())]
)


def picture_rules(config: PrepareConfig, plan: Layout) -> list[Rule]:
    """The rules that a configuration asks for, in the order in which they are applied."""
    settings = config.duplicates
    rules = [Rule(KEY, _Rows(plan, (), "key"), _first_of_equals, _Settled(KEY, "an earlier record has this key"))]
    before: tuple[str, ...] = (KEY,)
    if settings.exact:
        rules.append(Rule(EXACT, _Rows(plan, before, "sha256"), _first_of_equals, _Settled(EXACT, "same bytes as {}")))
        before += (EXACT,)
    if settings.near_distance is not None:
        rows, settled = _Rows(plan, before, "phash"), _Settled(NEAR, "looks like {}")
        rules.append(Rule(NEAR, rows, _looks_alike, settled, copies=settings.near_distance + 1))
    return rules


@dataclass(frozen=True)
class _Rows:
    """The rows of a group of units that earlier rules left: bucket, place, pixels, key, and what the rule compares."""

    plan: Layout
    before: tuple[str, ...]
    column: str

    def __call__(self, job: Job, units: range) -> pa.Table:
        settings = job.config.duplicates
        columns = {"key", "width", "height", self.column} | ({"colours"} if self.column == "phash" else set())
        tables = []
        gone = gone_places(job, self.plan, units, self.before)
        for unit in units:
            file = open_table(job.path("examine", unit, "parquet"))
            table = file.read(columns=sorted(columns), use_threads=False)
            places = (np.int64(unit) << SHIFT) + np.arange(table.num_rows)
            pixels = table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy()
            if settings.representative == "first" or self.column == "key":
                pixels[:] = 0
            table = table.drop_columns(["width", "height"])
            table = table.append_column("place", pa.array(places)).append_column("pixels", pa.array(pixels))
            tables.append(table.filter(pa.array(~np.isin(places, gone))))
        rows = pa.concat_tables(tables)
        if self.column == "phash":
            assert settings.near_distance is not None
            found = bands(rows["phash"].to_numpy(), settings.near_distance)
            copies = pa.concat_tables([rows] * len(found))
            return copies.append_column("bucket", pa.array(np.concatenate(list(found))))
        if self.column == "key":
            digests = [hashlib.blake2b(key.encode(), digest_size=16).digest() for key in rows["key"].to_pylist()]
            rows = rows.append_column("sha256", pa.array(digests, pa.binary(16)))
        return rows.append_column("bucket", pa.array(_words(rows["sha256"])[:, 0]))


def _words(column: pa.ChunkedArray) -> Array:
    """uint64 [N, 2] from a column of 16 bytes each."""
    return np.frombuffer(b"".join(column.to_pylist()), dtype=np.uint64).reshape(-1, 2)


def _changes(sorted_values: Array) -> Array:
    """bool [N]: where a sorted array [N] or [N, columns] has a value that it did not have before."""
    if not len(sorted_values):
        return np.zeros(0, dtype=bool)
    differ = sorted_values[1:] != sorted_values[:-1]
    return np.r_[True, differ.any(axis=1) if differ.ndim > 1 else differ]


def _ranks(rows: pa.Table) -> Array:
    """int64 [N]: the order of rows by more pixels, then by place. Copies of a row, one for each band, share a rank."""
    places = rows["place"].to_numpy()
    sort = np.lexsort((places, -rows["pixels"].to_numpy()))
    ranks = np.empty(len(places), dtype=np.int64)
    ranks[sort] = np.cumsum(_changes(places[sort]))
    return ranks


def _found(rows: pa.Table, of: Array, other: Array) -> pa.Table:
    """Findings: rows `of` have earlier ones `other`."""
    found = rows.take(pa.array(other))
    columns = [rows["place"].take(pa.array(of)), found["pixels"], found["place"], found["key"]]
    return pa.table(columns, schema=_FOUND)


def _first_of_equals(job: Job, rows: pa.Table) -> pa.Table:
    words, ranks = _words(rows["sha256"]), _ranks(rows)
    sort = np.lexsort((ranks, words[:, 1], words[:, 0]))
    new = _changes(words[sort])
    first = sort[np.flatnonzero(new)[np.cumsum(new) - 1]] if len(sort) else sort
    return _found(rows, sort[~new], first[~new])


def _looks_alike(job: Job, rows: pa.Table) -> pa.Table:
    settings = job.config.duplicates
    assert settings.near_distance is not None
    colours = np.frombuffer(b"".join(rows["colours"].to_pylist()), dtype=np.uint8).reshape(-1, COLOURS)
    runs, hashes = rows["bucket"].to_numpy(), rows["phash"].to_numpy()
    twins = earlier_twins(runs, hashes, colours, _ranks(rows), settings.near_distance, settings.near_colour)
    of = np.flatnonzero(twins >= 0)
    return _found(rows, of, twins[of])


@dataclass(frozen=True)
class _Settled:
    """One decision for each row with findings, naming the earliest of the others."""

    rule: str
    detail: str

    def __call__(self, job: Job, found: pa.Table) -> pa.Table:
        places = found["place"].to_numpy()
        sort = np.lexsort((found["other_place"].to_numpy(), -found["other_pixels"].to_numpy(), places))
        first = sort[_changes(places[sort])]
        others = found["other"].take(pa.array(first)).to_pylist()
        columns = {
            "place": places[first],
            "caption": np.full(len(first), RECORD, dtype=np.int16),
            "rule": [self.rule] * len(first),
            "detail": [self.detail.format(other) for other in others],
        }
        return pa.table(columns, schema=DECISIONS)
