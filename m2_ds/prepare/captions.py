"""Captions that many pictures share, in the same or nearly the same words: of each, the first few stay.

Similar texts meet through bands of MinHash signatures (Broder 1997; datasketch computes them) over character trigrams,
which serve Chinese and English alike. Where they meet, the two sets of trigrams are compared exactly (Jaccard).
"""

import functools
import hashlib
import zlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasketch import MinHash

from m2_ds.prepare.config import PrepareConfig
from m2_ds.prepare.exchange import DECISIONS, SHIFT, Layout, Rule, gone_places, read_part
from m2_ds.prepare.work import Job, open_table

LIKE, REPEATED = "caption_like", "repeated_caption"
PERMUTATIONS = 128
# A caption's leader: the first caption of those like it, itself if there is none earlier.
_LED = pa.schema(
    [
        ("place", pa.int64()),
        ("caption", pa.int16()),
        ("leader", pa.int64()),
        ("leader_caption", pa.int16()),
        ("leader_text", pa.string()),
    ]
)


def caption_rules(config: PrepareConfig, plan: Layout, before: tuple[str, ...]) -> list[Rule]:
    """Two rounds: captions find their leaders; then each leader's followers are counted."""
    if config.duplicates.caption_repeats is None:
        return []
    copies = bands_of(config.duplicates.caption_similarity)
    return [
        Rule(LIKE, _Texts(plan, before), _lead, _least_leader, copies=copies),
        Rule(REPEATED, _Led(plan), _beyond, _decide),
    ]


def bands_of(similarity: float) -> int:
    """Bands of the signature: the fewest for which texts of that similarity meet with a probability of 0.94 or more."""
    if similarity >= 1:
        return 1
    for rows in (32, 16, 8, 4, 2):
        if 1 - (1 - similarity**rows) ** (PERMUTATIONS // rows) >= 0.94:
            return PERMUTATIONS // rows
    return PERMUTATIONS


def trigrams(text: str) -> frozenset[str]:
    """What two captions have in common: trigrams of their letters, in any case and however they are spaced."""
    text = " ".join(text.casefold().split())
    return frozenset(text[i : i + 3] for i in range(max(1, len(text) - 2)))


def band_hashes(texts: list[str], bands: int) -> np.ndarray:
    """uint64 [texts, bands]: texts with an equal entry in a band are compared. One band: equal texts only."""
    if bands == 1:
        digests = b"".join(hashlib.blake2b(text.casefold().encode(), digest_size=8).digest() for text in texts)
        return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 1)
    grams = ([gram.encode() for gram in sorted(trigrams(text))] for text in texts)
    signatures = [
        signature.hashvalues
        for signature in MinHash.generator(grams, num_perm=PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
    ]
    rows = PERMUTATIONS // bands
    found = np.empty((len(texts), bands), dtype=np.uint64)
    for i, signature in enumerate(signatures):
        packed = np.ascontiguousarray(signature, dtype=np.uint64)
        for band in range(bands):
            piece = packed[band * rows : (band + 1) * rows].tobytes()
            # The band's number is hashed, too: bands do not meet each other.
            digest = hashlib.blake2b(piece, digest_size=8, salt=band.to_bytes(2, "little")).digest()
            found[i, band] = int.from_bytes(digest, "little")
    return found


@dataclass(frozen=True)
class _Texts:
    plan: Layout
    before: tuple[str, ...]

    def __call__(self, job: Job, units: range) -> pa.Table:
        bands = bands_of(job.config.duplicates.caption_similarity)
        gone = gone_places(job, self.plan, units, self.before)
        places: list[int] = []
        numbers: list[int] = []
        texts: list[str] = []
        for unit in units:
            file = open_table(job.path("examine", unit, "parquet"))
            column = file.read(columns=["captions"], use_threads=False)["captions"].to_pylist()
            here = (np.int64(unit) << SHIFT) + np.arange(len(column))
            for row in np.flatnonzero(~np.isin(here, gone)):
                for number, caption in enumerate(column[row]):
                    places.append(int(here[row]))
                    numbers.append(number)
                    texts.append(caption["text"])
        columns = [pa.array(places, pa.int64()), pa.array(numbers, pa.int16()), pa.array(texts, pa.string())]
        rows = pa.table(columns, names=["place", "caption", "text"])
        hashes = band_hashes(texts, bands)
        copies = pa.concat_tables([rows] * bands)
        return copies.append_column("bucket", pa.array(hashes.T.reshape(-1).astype(np.uint64)))


def _lead(job: Job, rows: pa.Table) -> pa.Table:
    """Leaders within each run of equal band hashes: a text follows the first leader that is similar enough."""
    least = job.config.duplicates.caption_similarity
    runs = rows["bucket"].to_numpy()
    sort = np.lexsort((rows["caption"].to_numpy(), rows["place"].to_numpy(), runs))
    edges = np.r_[np.flatnonzero(np.r_[True, runs[sort][1:] != runs[sort][:-1]]), len(sort)] if len(sort) else [0]
    texts = rows["text"].to_pylist()
    leaders = np.arange(len(sort))
    grams_of = functools.lru_cache(maxsize=1 << 16)(trigrams)
    for low, high in zip(edges[:-1], edges[1:]):
        if high - low == 1:
            continue
        known: dict[str, int] = {}
        found: list[tuple[frozenset[str], int]] = []
        for row in sort[low:high].tolist():
            text = texts[row].casefold()
            if text not in known:
                grams = grams_of(text)
                leader = next((i for other, i in found if _similar(grams, other) >= least), None)
                if leader is None:
                    found.append((grams, row))
                known[text] = row if leader is None else leader
            leaders[row] = known[text]
    led = rows.take(pa.array(leaders))
    columns = [rows["place"], rows["caption"], led["place"], led["caption"], led["text"]]
    return pa.table(columns, schema=_LED)


def _similar(one: frozenset[str], other: frozenset[str]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _least_leader(job: Job, found: pa.Table) -> pa.Table:
    places, numbers = found["place"].to_numpy(), found["caption"].to_numpy()
    keys = (found["leader_caption"].to_numpy(), found["leader"].to_numpy(), numbers, places)
    sort = np.lexsort(keys)
    new = np.ones(len(sort), dtype=bool)
    new[1:] = (places[sort][1:] != places[sort][:-1]) | (numbers[sort][1:] != numbers[sort][:-1])
    return found.take(pa.array(sort[new]))


@dataclass(frozen=True)
class _Led:
    """What the first round settled, spread by leader."""

    plan: Layout

    def __call__(self, job: Job, units: range) -> pa.Table:
        group = self.plan.groups.index((units.start, units.stop))
        table = read_part(job.folder / LIKE / f"{group:06d}.arrow", 0)
        bucket = table["leader"].to_numpy().astype(np.uint64) * np.uint64(1 << 10)
        return table.append_column("bucket", pa.array(bucket + table["leader_caption"].to_numpy().astype(np.uint64)))


def _beyond(job: Job, rows: pa.Table) -> pa.Table:
    """Captions that have at least `caption_repeats` earlier ones with the same leader."""
    most = job.config.duplicates.caption_repeats
    leader, of = rows["leader"].to_numpy(), rows["leader_caption"].to_numpy()
    sort = np.lexsort((rows["caption"].to_numpy(), rows["place"].to_numpy(), of, leader))
    new = np.ones(len(sort), dtype=bool)
    new[1:] = (leader[sort][1:] != leader[sort][:-1]) | (of[sort][1:] != of[sort][:-1])
    starts = np.flatnonzero(new)[np.cumsum(new) - 1] if len(sort) else sort
    beyond = np.arange(len(sort)) - starts >= most
    return rows.take(pa.array(sort[beyond])).select(_LED.names)


def _decide(job: Job, found: pa.Table) -> pa.Table:
    most = job.config.duplicates.caption_repeats
    found = found.sort_by([("place", "ascending"), ("caption", "ascending")])
    texts = found["leader_text"].to_pylist()
    columns = {
        "place": found["place"],
        "caption": found["caption"],
        "rule": [REPEATED] * len(texts),
        "detail": [f"{most} earlier ones are like {text[:100]!r}" for text in texts],
    }
    return pa.table(columns, schema=DECISIONS)
