"""A unit's candidates with what the comparing rules decided about them: what scoring and writing go through."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from m2_ds.data.records import Caption, HardNegative
from m2_ds.prepare.exchange import RECORD, SHIFT, Layout, decisions
from m2_ds.prepare.pairs import CaptionDrops, Drop, Pair
from m2_ds.prepare.work import RECORD_COLUMNS, Job, open_table, read_table


class Judged(NamedTuple):
    """A candidate: its row, itself with the captions that are left, and the captions that went."""

    row: int
    draw: int
    pair: Pair
    drops: CaptionDrops


class Plan(NamedTuple):
    """What the steps after `compare` have to know of it."""

    layout: Layout
    rules: list[str]  # in the order of their application


def judged(job: Job, plan: Plan, unit: int, file: str, *, images: bool = True) -> Iterator[list[Judged]]:
    """The candidates of a unit in order, batch by batch; those that a rule left out have a `drop`."""
    verdicts: dict[int, Drop] = {}
    captions: dict[int, dict[int, Drop]] = {}
    for table in decisions(job, plan.layout, unit, plan.rules):
        for entry in table.to_pylist():
            row = entry["place"] - (unit << SHIFT)
            drop = Drop(entry["rule"], entry["detail"])
            if entry["caption"] == RECORD:
                verdicts.setdefault(row, drop)
            else:
                captions.setdefault(row, {})[entry["caption"]] = drop
    columns = [name for name in [*RECORD_COLUMNS, "draw"] if images or name != "image"]
    first = 0
    for batch in open_table(job.path("examine", unit, "parquet")).iter_batches(128, columns=columns, use_threads=False):
        yield [
            _judge(first + i, entry, file, verdicts.get(first + i), captions.get(first + i, {}))
            for i, entry in enumerate(batch.to_pylist())
        ]
        first += batch.num_rows


def _judge(row: int, entry: dict[str, Any], file: str, drop: Drop | None, gone: dict[int, Drop]) -> Judged:
    every = [Caption(**caption) for caption in entry["captions"]]
    pair = Pair(
        key=entry["key"],
        source=entry["source"],
        license=entry["license"],
        shard=file,
        captions=every,
        image=entry.get("image"),
        group=entry["group"],
        category=entry["category"],
        negatives=[HardNegative(**negative) for negative in entry["hard_negatives"] or ()],
        width=entry["width"],
        height=entry["height"],
        drop=drop,
    )
    drops: CaptionDrops = []
    if drop is None and gone:
        drops = [(every[number], why) for number, why in sorted(gone.items())]
        left = [caption for number, caption in enumerate(every) if number not in gone]
        if left:
            pair.captions = left
        else:
            # A record without captions goes under the rule of its first one, and its captions with it.
            pair.drop, drops = drops[0][1], []
    return Judged(row, entry["draw"], pair, drops)


class Scored:
    """What the scoring step wrote about a unit."""

    def __init__(self, job: Job, unit: int) -> None:
        table = read_table(job.path("score", unit, "parquet"))
        self.entries = {entry["row"]: entry for entry in table.to_pylist()}

    def apply(self, judgement: Judged) -> Judged:
        """The row with its new captions; one that scoring did not see was dropped before and stays as it is."""
        entry = self.entries.get(judgement.row)
        if entry is None:
            return judgement
        pair = judgement.pair
        pair.captions = [Caption(**caption) for caption in entry["captions"]]
        drops = [(Caption(**d["caption"]), Drop(d["rule"], d["detail"])) for d in entry["dropped"]]
        if entry["rule"] is not None:
            pair.drop = Drop(entry["rule"], entry["detail"])
        return Judged(judgement.row, judgement.draw, pair, judgement.drops + drops)
