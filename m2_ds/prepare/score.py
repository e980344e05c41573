"""The scoring step: users' scores, similarity of picture and caption, and rewriting, over what the other rules left."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from time import thread_time
from typing import Any

import pyarrow as pa

from m2_ds.data.decode import decode
from m2_ds.data.memory import keep_freed_memory
from m2_ds.data.records import SCHEMA, Caption
from m2_ds.prepare.config import PrepareConfig
from m2_ds.prepare.pairs import CaptionDrops, Drop, Ledger, Pair
from m2_ds.prepare.readers import UNKNOWN
from m2_ds.prepare.scorers import Item, call, scorer_of
from m2_ds.prepare.survivors import Judged, Plan, judged
from m2_ds.prepare.text import TextRules
from m2_ds.prepare.work import Job, TableFile, Unit

STEP = "score"
WEAK = "weak"
_SIDE = 448  # shorter side that models are given at least, where the picture has it
_CAPTION = SCHEMA.field("captions").type.value_type
_SCORED = pa.schema(
    [
        ("row", pa.int32()),
        ("rule", pa.string()),
        ("detail", pa.string()),
        ("captions", pa.list_(_CAPTION)),
        ("dropped", pa.list_(pa.struct([("caption", _CAPTION), ("rule", pa.string()), ("detail", pa.string())]))),
        ("similarity", pa.list_(pa.float32())),
    ]
)


def needed(config: PrepareConfig) -> bool:
    """Whether a configuration asks for this step."""
    return bool(config.similarity or config.scores or config.rewrite)


def score(job: Job, item: tuple[Unit, Plan]) -> dict[str, Any]:
    """NUMBER.parquet: what became of each row that the comparing rules left; NUMBER.json: counts."""
    keep_freed_memory()
    unit, plan = item
    scoring = _Scoring(job)
    with TableFile(job.path(STEP, unit.number, "parquet"), _SCORED) as file:
        rows = (r for batch in judged(job, plan, unit.number, unit.file) for r in batch if r.pair.drop is None)
        while batch := list(islice(rows, scoring.batch_size)):
            file.write(pa.Table.from_pylist(list(scoring.batch(batch)), schema=_SCORED))
    content = {"ledger": scoring.ledger.to_json(), "dropped": scoring.dropped}
    job.finish(STEP, unit.number, content)
    return content


class _Work:
    """A record while it is scored."""

    def __init__(self, row: int, pair: Pair) -> None:
        self.row, self.pair = row, pair
        assert isinstance(pair.image, bytes)
        self.picture = decode(pair.image, lambda w, h: min(1.0, _SIDE / min(w, h)))
        self.captions = list(pair.captions)
        self.drop: Drop | None = None
        self.drops: CaptionDrops = []
        self.marked: list[Caption] = []  # under the threshold, to be rewritten
        self.similarity: list[float] = []

    def item(self) -> Item:
        captions = [(caption.language, caption.text) for caption in self.captions]
        return Item(self.pair.key, self.pair.source, self.picture, captions)


class _Scoring:
    def __init__(self, job: Job) -> None:
        self.job, self.config = job, job.config
        self.ledger = Ledger()
        self.text = TextRules(self.config.text)
        self.dropped = 0
        blocks = (self.config.similarity, self.config.rewrite, *self.config.scores)
        self.batch_size = max(block.batch_size for block in blocks if block is not None)

    def batch(self, rows: list[Judged]) -> Iterator[dict[str, Any]]:
        start = thread_time()
        works = [_Work(judgement.row, judgement.pair) for judgement in rows]
        self.ledger.seconds["decode again"] += thread_time() - start  # type: ignore[assignment]
        for stage in ("scores", "similarity", "rewrite"):
            start = thread_time()
            getattr(self, f"_{stage}")([work for work in works if work.drop is None])
            self.ledger.seconds[stage] += thread_time() - start  # type: ignore[assignment]
        for work in works:
            self.dropped += work.drop is not None
            yield {
                "row": work.row,
                "rule": work.drop.rule if work.drop else None,
                "detail": work.drop.detail if work.drop else None,
                "captions": [asdict(caption) for caption in work.captions],
                "dropped": [{"caption": asdict(c), "rule": d.rule, "detail": d.detail} for c, d in work.drops],
                "similarity": work.similarity,
            }

    def _scores(self, works: list[_Work]) -> None:
        for block in self.config.scores:
            works = [work for work in works if work.drop is None]
            for some in _batches(works, block.batch_size):
                answers = call(block.function, self.job.home, [work.item() for work in some])
                for work, answer in zip(some, answers):
                    try:
                        value = float(answer)
                    except (TypeError, ValueError):
                        value = float("nan")
                    if value != value:
                        raise ValueError(
                            f"function {block.function!r} answered {answer!r} about {work.pair.key!r}, no number"
                        )
                    if (block.min is not None and value < block.min) or (block.max is not None and value > block.max):
                        work.drop = Drop(block.rule, f"score {value:g}")

    def _similarities(self, works: list[_Work], captions: list[list[Caption]]) -> list[list[float]]:
        settings = self.config.similarity
        assert settings is not None
        scorer = scorer_of(settings)
        found: list[list[float]] = []
        for low in range(0, len(works), settings.batch_size):
            some, theirs = works[low : low + settings.batch_size], captions[low : low + settings.batch_size]
            of = [place for place, entries in enumerate(theirs) for _ in entries]
            if of:
                texts = [caption.text for entries in theirs for caption in entries]
                values = iter(scorer([work.picture for work in some], texts, of).tolist())
            found += [[next(values) for _ in entries] for entries in theirs]
        for work, entries, numbers in zip(works, captions, found):
            for caption, value in zip(entries, numbers):
                if value != value:
                    raise ValueError(f"similarity.model {settings.model} gives no number for {work.pair.key!r}")
                self.ledger.observe("similarity", caption.language, value)
        return found

    def _similarity(self, works: list[_Work]) -> None:
        settings = self.config.similarity
        if settings is None or not works:
            return
        for work, values in zip(works, self._similarities(works, [work.captions for work in works])):
            low = [(c, v) for c, v in zip(work.captions, values) if v < settings.min]
            if settings.below == "mark":
                weak = {id(caption) for caption, _ in low}
                work.captions = [_of_kind(c, WEAK) if id(c) in weak else c for c in work.captions]
            elif settings.below == "rewrite":
                work.marked = [caption for caption, _ in low]
            elif low and len(low) == len(work.captions):
                work.drop = Drop("low_similarity", f"{max(values):.3f}")
            elif low:
                work.drops += [(caption, Drop("low_similarity", f"{value:.3f}")) for caption, value in low]
                work.captions = [c for c, v in zip(work.captions, values) if v >= settings.min]
                values = [value for value in values if value >= settings.min]
            work.similarity = values

    def _rewrite(self, works: list[_Work]) -> None:
        block = self.config.rewrite
        if block is None:
            return
        wanted = [work for work in works if self._is_wanted(work)]
        for some in _batches(wanted, block.batch_size):
            answers = call(block.function, self.job.home, [work.item() for work in some])
            fresh = [self._clean(work, answer) for work, answer in zip(some, answers)]
            values: list[list[float]] = [[] for _ in some]
            if self.config.similarity is not None:
                values = self._similarities(some, fresh)
            for work, captions, numbers in zip(some, fresh, values):
                self._take(work, captions, numbers)

    def _is_wanted(self, work: _Work) -> bool:
        block = self.config.rewrite
        assert block is not None
        if block.when == "low_similarity":
            return bool(work.marked)
        if block.when == "missing_language":
            return not set(self.config.text.languages) <= {caption.language for caption in work.captions}
        work.marked = list(work.captions)
        return True

    def _clean(self, work: _Work, answer: Any) -> list[Caption]:
        """A function's answer as captions that pass the rules of texts."""
        block = self.config.rewrite
        assert block is not None
        entries = [answer] if isinstance(answer, str | dict) else list(answer or ())
        captions = []
        for entry in entries:
            text, language = (entry, UNKNOWN) if isinstance(entry, str) else (entry.get("text"), entry.get("language"))
            if not isinstance(text, str):
                raise ValueError(
                    f"function {block.function!r} answered {str(entry)[:80]!r} about {work.pair.key!r}, no caption"
                )
            captions.append(Caption(text, language or UNKNOWN, 1.0, block.kind))
        self.ledger.captions_added[block.kind] += len(captions)
        kept, drops = self.text.apply(captions)
        work.drops += drops
        return kept

    def _take(self, work: _Work, fresh: list[Caption], values: list[float]) -> None:
        """New captions into a record: in the place of the marked ones, which stay under another kind."""
        block, settings = self.config.rewrite, self.config.similarity
        assert block is not None
        if settings is not None:
            low = [(c, v) for c, v in zip(fresh, values) if v < settings.min]
            work.drops += [(caption, Drop("low_similarity", f"{value:.3f}")) for caption, value in low]
            fresh = [c for c, v in zip(fresh, values) if v >= settings.min]
        marked = {id(caption) for caption in work.marked}
        if not fresh and block.when == "low_similarity":
            if len(marked) == len(work.captions):
                work.drop = Drop("not_rewritten", "no new caption passes")
            else:
                work.drops += [(c, Drop("not_rewritten", "no new caption passes")) for c in work.marked]
                work.captions = [c for c in work.captions if id(c) not in marked]
        elif fresh:
            work.captions = [_of_kind(c, block.original_kind) if id(c) in marked else c for c in work.captions] + fresh


def _of_kind(caption: Caption, kind: str) -> Caption:
    return Caption(caption.text, caption.language, caption.weight, kind)


def _batches(works: list[_Work], size: int) -> Iterator[list[_Work]]:
    return (works[low : low + size] for low in range(0, len(works), size))
