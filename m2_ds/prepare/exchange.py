"""Small columns of all units, regrouped so that rows which have to meet do: how a rule sees all records.

A rule runs in three rounds of tasks, each with files of bounded size, so that memory does not grow with the input:

    spread   a group of units      -> RULE.spread/GROUP.arrow    its rows, one record batch a bucket
    meet     a bucket              -> RULE.meet/BUCKET.arrow     what the rule found, one record batch a group
    settle   a group of units      -> RULE/GROUP.arrow           decisions about the group's rows, by place

A row's `place` is its unit's number and its row in that unit's file: the order of the input.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from m2_ds.files import publish
from m2_ds.prepare.work import Job

SHIFT = 32  # place = unit << 32 | row
RECORD = -1  # in a decision's `caption`: the whole record

DECISIONS = pa.schema(
    [
        ("place", pa.int64()),
        ("caption", pa.int16()),  # which caption of the record; -1: the record itself
        ("rule", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Layout:
    """How units are grouped, and how many buckets a rule spreads its rows over."""

    groups: list[tuple[int, int]]  # units [first, last) of each
    rows: int
    most: int  # about as many rows a group, and a bucket

    def buckets(self, copies: int = 1) -> int:
        return max(1, -(-self.rows * copies // self.most))

    def group_of(self, places: np.ndarray) -> np.ndarray:
        """Which group each place belongs to."""
        starts = np.array([first for first, _ in self.groups], dtype=np.int64)
        return np.searchsorted(starts, places >> SHIFT, side="right") - 1


def layout(rows: list[int], most: int) -> Layout:
    """Groups of consecutive units of about `most` rows; `rows` counts each unit's."""
    groups, first, held = [], 0, 0
    for unit, count in enumerate(rows):
        held += count
        if held >= most:
            groups.append((first, unit + 1))
            first, held = unit + 1, 0
    if first < len(rows):
        groups.append((first, len(rows)))
    return Layout(groups, sum(rows), most)


def write_parts(path: Path, table: pa.Table, part: np.ndarray, parts: int) -> None:
    """An Arrow file of `parts` record batches, the rows of each in the table's order; `part` says where a row goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    order = np.argsort(part, kind="stable")
    edges = np.searchsorted(part[order], np.arange(parts + 1))
    table = table.take(pa.array(order)).combine_chunks()
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        for low, high in zip(edges[:-1], edges[1:]):
            piece = table.slice(low, high - low).to_batches(max_chunksize=None)
            file.write_batch(piece[0] if piece else pa.RecordBatch.from_pylist([], schema=table.schema))
    publish(aside, path)


def read_part(path: Path, part: int) -> pa.Table:
    """One record batch of such a file."""
    with pa.OSFile(str(path), "rb") as source:
        return pa.Table.from_batches([pa.ipc.open_file(source).get_batch(part)])


def read_parts(folder: Path, count: int, part: int) -> pa.Table:
    """One part of each of the files 0 .. count - 1 of a folder, in their order."""
    return pa.concat_tables([read_part(folder / f"{number:06d}.arrow", part) for number in range(count)])


def write_plain(path: Path, table: pa.Table) -> None:
    write_parts(path, table, np.zeros(table.num_rows, dtype=np.int64), 1)


@dataclass(frozen=True)
class Rule:
    """A rule over all records.

    rows: (job, units) -> the rows that have to meet, with columns `bucket` (uint64, spread by its hash) and `place`.
    meet: (job, rows of one bucket) -> findings, with a column `place`.
    settle: (job, findings about a group, sorted by nothing) -> decisions.
    """

    name: str
    rows: Callable[[Job, range], pa.Table]
    meet: Callable[[Job, pa.Table], pa.Table]
    settle: Callable[[Job, pa.Table], pa.Table]
    copies: int = 1  # rows a record


def spread(job: Job, item: tuple[Rule, Layout, int]) -> dict[str, Any]:
    rule, plan, group = item
    path = job.folder / f"{rule.name}.spread" / f"{group:06d}.arrow"
    if not path.exists():
        table = rule.rows(job, range(*plan.groups[group]))
        buckets = plan.buckets(rule.copies)
        write_parts(path, table, _mixed(table["bucket"].to_numpy()) % np.uint64(buckets), buckets)
    return {}


def meet(job: Job, item: tuple[Rule, Layout, int]) -> dict[str, Any]:
    rule, plan, bucket = item
    path = job.folder / f"{rule.name}.meet" / f"{bucket:06d}.arrow"
    if not path.exists():
        found = rule.meet(job, read_parts(job.folder / f"{rule.name}.spread", len(plan.groups), bucket))
        write_parts(path, found, plan.group_of(found["place"].to_numpy()), len(plan.groups))
    return {}


def settle(job: Job, item: tuple[Rule, Layout, int]) -> dict[str, Any]:
    rule, plan, group = item
    path = job.folder / rule.name / f"{group:06d}.arrow"
    if not path.exists():
        found = read_parts(job.folder / f"{rule.name}.meet", plan.buckets(rule.copies), group)
        write_plain(path, rule.settle(job, found))
    return {}


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64 hashes of uint64 values (SplitMix64's finaliser): near values go to far buckets."""
    values = values.astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def decisions(job: Job, plan: Layout, unit: int, rules: list[str]) -> Iterator[pa.Table]:
    """What the named rules decided about a unit's rows, rule by rule, sorted by place."""
    group = next(number for number, (first, last) in enumerate(plan.groups) if first <= unit < last)
    for name in rules:
        table = read_part(job.folder / name / f"{group:06d}.arrow", 0)
        low, high = np.searchsorted(table["place"].to_numpy(), [unit << SHIFT, (unit + 1) << SHIFT])
        yield table.slice(low, high - low)


def gone_places(job: Job, plan: Layout, units: range, rules: Sequence[str]) -> np.ndarray:
    """Places of records that the named rules left out, in a whole group of units."""
    group = plan.groups.index((units.start, units.stop))
    places = [np.zeros(0, dtype=np.int64)]
    for name in rules:
        table = read_part(job.folder / name / f"{group:06d}.arrow", 0)
        places.append(table["place"].to_numpy()[table["caption"].to_numpy() == RECORD])
    return np.concatenate(places)
