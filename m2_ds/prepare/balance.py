"""Target shares of sources and languages, held exactly by leaving records out, chosen by the hash of their key.

Legend: S sources, L languages of records ("en", "zh", "en+zh"); a class is one of each.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from m2_ds.prepare.config import BalanceConfig
from m2_ds.prepare.exchange import read_part, write_plain
from m2_ds.prepare.pairs import languages_of
from m2_ds.prepare.score import needed
from m2_ds.prepare.survivors import Plan, Scored, judged
from m2_ds.prepare.work import Job, Unit

STEP = "classes"
Class = tuple[str, str]
_BITS = 12  # of a draw, for the histograms that find each class's limit


def wanted(config: BalanceConfig) -> bool:
    """Whether anything is left out for the sake of balance."""
    return config.how == "drop" and bool(config.sources or config.languages or config.max_records)


def classify(job: Job, item: tuple[Unit, Plan]) -> dict[str, Any]:
    """NUMBER.arrow: class and draw of each record that is left; NUMBER.json: the classes and their counts."""
    unit, plan = item
    scored = Scored(job, unit.number) if needed(job.config) else None
    classes: dict[Class, list[int]] = {}
    for batch in judged(job, plan, unit.number, unit.file, images=False):
        for judgement in batch:
            judgement = scored.apply(judgement) if scored else judgement
            if judgement.pair.drop is None:
                name = (judgement.pair.source, languages_of(judgement.pair.captions))
                classes.setdefault(name, []).append(judgement.draw)
    names = sorted(classes)
    numbers = np.repeat(np.arange(len(names)), [len(classes[name]) for name in names])
    draws = np.array([number for name in names for number in classes[name]], dtype=np.uint64)
    table = pa.table({"class": pa.array(numbers, pa.int32()), "draw": pa.array(draws, pa.uint64())})
    write_plain(job.path(STEP, unit.number, "arrow"), table)
    counts = [[*name, len(classes[name])] for name in names]
    job.finish(STEP, unit.number, {"classes": counts})
    return {"classes": counts}


def quotas(there: dict[Class, int], config: BalanceConfig) -> dict[Class, int]:
    """How many records of each class stay: as many as the shares allow, at most `max_records`.

    With shares of both kinds, the counts between them keep the proportions of the input as far as the shares let them
    (iterative proportional fitting, Deming and Stephan 1940).

    Raises:
        ValueError: shares for what the input does not have, or that no selection can meet.
    """
    sources = sorted({source for source, _ in there})
    languages = sorted({language for _, language in there})
    table = np.zeros((len(sources), len(languages)))
    for (source, language), count in there.items():
        table[sources.index(source), languages.index(language)] = count
    shares = [_shares(sources, config.sources, "sources"), _shares(languages, config.languages, "languages")]
    fitted = table / max(1.0, table.sum())
    for _ in range(1000):
        for axis, share in ((1, shares[0]), (0, shares[1])):
            if share is not None:
                sums = fitted.sum(axis=axis)
                factor = np.divide(share, sums, out=np.zeros_like(sums), where=sums > 0)
                fitted = fitted * (factor[:, None] if axis else factor[None])
    for axis, share, names in ((1, shares[0], sources), (0, shares[1], languages)):
        if share is not None and (off := np.abs(fitted.sum(axis=axis) - share)).max() > 1e-3:
            worst = names[int(off.argmax())]
            raise ValueError(
                f"balance: no selection gives sources {config.sources} and languages {config.languages} at once; "
                f"{worst!r} can't reach its share with what the others have. Change or leave out one of the two"
            )
    # The largest total for which no class needs more than it has.
    ratios = np.divide(table, fitted, out=np.full_like(table, np.inf), where=fitted > 1e-12)
    total = min(float(ratios.min()), config.max_records or float("inf"), float(table.sum()))
    exact = fitted * total
    counts = np.floor(exact + 1e-9).astype(int)
    missing = int(round(total)) - int(counts.sum())
    order = np.argsort(-(exact - counts), axis=None, kind="stable")
    for place in [np.unravel_index(p, table.shape) for p in order]:
        if missing > 0 and counts[place] < table[place] and fitted[place] > 0:
            counts[place] += 1
            missing -= 1
    return {
        (source, language): int(counts[s, k])
        for s, source in enumerate(sources)
        for k, language in enumerate(languages)
        if table[s, k]
    }


def _shares(names: list[str], asked: dict[str, float], what: str) -> np.ndarray | None:
    if not asked:
        return None
    if unknown := sorted(name for name, share in asked.items() if share and name not in names):
        raise ValueError(f"balance.{what}: no record of {unknown} is left; there are {names}")
    shares = np.array([asked.get(name, 0.0) for name in names])
    return shares / shares.sum()


def limits(job: Job, units: Sequence[Unit], quota: dict[Class, int]) -> dict[Class, int]:
    """The largest draw that stays in each class (-1: none), by two passes over the classes' files.

    Exact but for records of one class whose 64-bit draws are equal: they stay or go together.
    """
    names = sorted(quota)
    histogram = np.zeros((len(names), 1 << _BITS), dtype=np.int64)
    for classes, draws in _pieces(job, units, names):
        bins = (draws >> np.uint64(64 - _BITS)).astype(np.int64)
        np.add.at(histogram, (classes, bins), 1)
    cumulated = histogram.cumsum(axis=1)
    need = np.array([quota[name] for name in names])
    # The bin in which the last of a class's records falls, and how many of that bin stay.
    bin_of = np.array([int(np.searchsorted(row, n)) for row, n in zip(cumulated, need)])
    before = np.array([row[b - 1] if b else 0 for row, b in zip(cumulated, bin_of)])
    inside: list[list[np.ndarray]] = [[] for _ in names]
    for classes, draws in _pieces(job, units, names):
        bins = (draws >> np.uint64(64 - _BITS)).astype(np.int64)
        for number in np.unique(classes):
            inside[number].append(draws[(classes == number) & (bins == bin_of[number])])
    found = {}
    for number, name in enumerate(names):
        rest = int(need[number] - before[number])
        if need[number] == 0:
            found[name] = -1
        else:
            found[name] = int(np.sort(np.concatenate(inside[number]))[rest - 1])
    return found


def _pieces(job: Job, units: Sequence[Unit], names: list[Class]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(class numbers, draws) of each unit."""
    for unit in units:
        done = job.finished(STEP, unit.number)
        assert done is not None
        there = np.array([names.index((source, languages)) for source, languages, _ in done["classes"]], dtype=np.int64)
        table = read_part(job.path(STEP, unit.number, "arrow"), 0)
        if table.num_rows:
            yield there[table["class"].to_numpy()], table["draw"].to_numpy()
