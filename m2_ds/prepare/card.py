"""The data card: one HTML page that needs no network, from the counts, samples and settings of a preparation."""

import importlib.metadata
import platform
from collections import Counter
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from m2_ds import __version__
from m2_ds.files import write_atomically
from m2_ds.prepare.config import RULES, PrepareConfig
from m2_ds.prepare.pairs import EDGES, Ledger
from m2_ds.prepare.samples import Samples

CARD_FILE = "card.html"
PICTURE_BYTES = 4_000_000  # of all sample pictures together, as text
_LIBRARIES = ("pillow", "pyarrow", "numpy", "py3langid", "datasketch", "ray")

# What each rule means, for people who read the card and not the code.
MEANING = {
    "bad_line": "a line that is no record: not JSON, not UTF-8, or of another number of fields",
    "bad_fields": "fields of a wrong type",
    "not_downloaded": "the input itself says that the picture was not downloaded",
    "not_fetched": "the picture's URL gave no picture",
    "no_caption": "no caption, or nothing left of it after cleaning",
    "short_caption": "too few characters",
    "long_caption": "too many characters",
    "no_letters": "neither letters nor Chinese characters",
    "repetition": "one character or word over and over",
    "boilerplate": "file names, 'click here' and the like",
    "language": "a language that is not asked for",
    "missing_picture": "no picture",
    "empty_picture": "a picture of 0 bytes",
    "too_many_bytes": "encoded picture too large",
    "broken_picture": "the picture can't be decoded",
    "too_many_pixels": "more pixels than are decoded (decompression bombs)",
    "format": "a format that is not asked for",
    "animated": "an animation",
    "aspect_ratio": "too long for its width",
    "too_small": "too small",
    "single_colour": "one colour all over",
    "evaluation_picture": "equal to a picture of an evaluation set",
    "evaluation_near_picture": "looks like a picture of an evaluation set",
    "evaluation_caption": "a caption of an evaluation set",
    "duplicate_key": "an earlier record has the same key",
    "duplicate_picture": "an earlier record has the same picture, byte for byte",
    "near_duplicate_picture": "an earlier picture looks the same",
    "repeated_caption": "enough earlier records have this caption, or nearly",
    "low_similarity": "the model finds that caption and picture do not fit",
    "not_rewritten": "rewriting gave no caption that passes",
    "balance": "left out to reach the target shares",
}


def rule_order(config: PrepareConfig, ledger: Ledger) -> list[str]:
    """All rules in the order in which they are applied: the program's, and the user's among them."""
    order = list(RULES)
    place = order.index("no_caption")
    order[place:place] = [column.rule for column in config.columns]
    place = order.index("low_similarity")
    order[place:place] = [block.rule for block in config.scores]
    return order + sorted({rule for _, rule, _, _ in ledger.dropped} - set(order))


def write_card(config: PrepareConfig, ledger: Ledger, samples: Samples) -> None:
    """Write card.html into the output folder."""
    environment = Environment(
        loader=PackageLoader("m2_ds.prepare", "templates"),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["percent"] = _percent
    rules = rule_order(config, ledger)
    page = environment.get_template("card.html.j2").render(
        title=config.name or config.out.resolve().name,
        read=ledger.read.total(),
        kept=ledger.kept.total(),
        captions_read=ledger.captions_read.total(),
        captions_added=ledger.captions_added.total(),
        captions_kept=ledger.captions_kept.total(),
        funnel=_funnel(ledger, rules),
        sources=_by(ledger.read, ledger.kept),
        source_totals=ledger.read,
        languages=_languages(ledger),
        broken=ledger.broken,
        charts=_charts(ledger),
        galleries=_galleries(samples, rules),
        settings=yaml.safe_dump(config.decides(), sort_keys=False, allow_unicode=True, width=100),
        versions={"m2_ds": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _LIBRARIES},
    )
    write_atomically(config.out / CARD_FILE, page.encode())


def _percent(part: float, whole: float) -> str:
    if not whole:
        return "-"
    share = 100 * part / whole
    return f"{share:.1f}%" if share >= 0.05 or part == 0 else "<0.1%"


def _funnel(ledger: Ledger, rules: list[str]) -> list[dict[str, Any]]:
    """One row a rule that took something: records, what is left, captions that went alone or with their record."""
    records: Counter[str] = Counter()
    captions: Counter[str] = Counter()
    for (level, rule, _, _), count in ledger.dropped.items():
        (records if level == "record" else captions)[rule] += count
    rows = []
    left = ledger.read.total()
    for rule in rules:
        if records[rule] or captions[rule]:
            left -= records[rule]
            rows.append(
                {
                    "rule": rule,
                    "meaning": MEANING.get(rule, "a rule of the settings"),
                    "records": records[rule],
                    "left": left,
                    "alone": captions[rule],
                    "gone": ledger.gone[rule],
                }
            )
    return rows


def _by(read: Counter[str], kept: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
    sums: Counter[str] = Counter()
    for (source, _), count in kept.items():
        sums[source] += count
    return [{"name": name, "read": read[name], "kept": sums[name]} for name in sorted(read.keys() | sums.keys())]


def _languages(ledger: Ledger) -> list[dict[str, Any]]:
    """Captions by language: kept, and left out by themselves."""
    kept: Counter[str] = Counter()
    gone: Counter[str] = Counter()
    for (_, language), count in ledger.captions_kept.items():
        kept[language] += count
    for (level, _, _, language), count in ledger.dropped.items():
        if level == "caption":
            gone[language] += count
    records: Counter[str] = Counter()
    for (_, languages), count in ledger.kept.items():
        records[languages] += count
    names = sorted(kept, key=lambda name: (-kept[name], name))
    rows = [{"name": name, "kept": kept[name], "records": records[name]} for name in names]
    return rows + [{"name": name, "kept": 0, "records": records[name]} for name in sorted(set(records) - set(names))]


def _charts(ledger: Ledger) -> list[dict[str, Any]]:
    """Histograms as bars: [{name, series: [{language, total, bars: [{label, count, height in percent}]}]}]."""
    charts = []
    for name, edges in EDGES.items():
        found = {key.split("\t")[1]: bins for key, bins in ledger.histograms.items() if key.split("\t")[0] == name}
        if not found:
            continue
        series = []
        for language, bins in sorted(found.items()):
            used = range(min(bins), max(bins) + 1)
            most = max(bins.values())
            bars = [
                {"label": _bin(edges, b), "count": bins.get(b, 0), "height": round(100 * bins.get(b, 0) / most, 1)}
                for b in used
            ]
            series.append({"language": language, "total": bins.total(), "bars": bars})
        charts.append({"name": name, "series": series})
    return charts


def _bin(edges: list[float], number: int) -> str:
    return f"{edges[number]:g}" + ("+" if number == len(edges) - 1 else "")


def _galleries(samples: Samples, rules: list[str]) -> list[dict[str, Any]]:
    """Samples of what was kept and of each rule, as many as fit; all rules get their share of the space."""
    names = [name for name in ["kept", *rules] if samples.rules.get(name)]
    galleries = []
    room = PICTURE_BYTES // max(1, len(names))
    for name in names:
        shown, used = [], 0
        for sample in samples.rules[name]:
            used += len(sample["jpeg"] or "")
            if used > room:
                break
            shown.append(sample)
        galleries.append({"rule": name, "meaning": MEANING.get(name, ""), "samples": shown})
    return galleries
