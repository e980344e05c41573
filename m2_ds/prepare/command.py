"""The console commands of a preparation."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import pyarrow.dataset as ds
import tyro
from rich.console import Console
from rich.table import Table

from m2_ds.prepare.card import rule_order
from m2_ds.prepare.config import load_config
from m2_ds.prepare.pairs import Ledger
from m2_ds.prepare.run import run

Overrides = Annotated[tuple[str, ...], tyro.conf.Positional]


def prepare(
    config: tyro.conf.Positional[Path],
    overrides: Overrides = (),
    *,
    restart: bool = False,
    workers: int | None = None,
    address: str | None = None,
) -> None:
    """Raw pairs to a data set: cleaned, filtered, without duplicates, scored, balanced; a card counts every rule.

    Call it again to go on after it was cut off. All fields of the YAML file: docs/preparation.md.

    Args:
        config: YAML file.
        overrides: field=value, e.g. text.length.min_characters=3 inputs.0.name=web.
        restart: take away what lies in the output folder and begin anew.
        workers: processes; by default one a core; 0: this process, without Ray.
        address: of a Ray cluster, e.g. auto; by default Ray is started on this machine.
    """
    extra = [f"work.workers={workers}"] * (workers is not None) + [f"work.address={address}"] * (address is not None)
    settings = load_config(config, (*overrides, *extra))
    ledger = run(settings, config.parent, restart=restart)
    show(ledger, rule_order(settings, ledger))
    print(f"data set: {settings.out}\ncard: {settings.out / 'card.html'}")


def show(ledger: Ledger, rules: list[str]) -> None:
    """Print what every rule took."""
    records: Counter[str] = Counter()
    captions: Counter[str] = Counter()
    for (level, rule, _, _), count in ledger.dropped.items():
        (records if level == "record" else captions)[rule] += count
    table = Table("rule", "records", "left", "captions", title="what was left out")
    left = ledger.read.total()
    table.add_row("(read)", f"{left:,}", f"{left:,}", f"{ledger.captions_read.total():,}")
    for rule in rules:
        if records[rule] or captions[rule]:
            left -= records[rule]
            table.add_row(rule, f"{records[rule]:,}", f"{left:,}", f"{captions[rule] + ledger.gone[rule]:,}")
    table.add_row("(kept)", f"{ledger.kept.total():,}", "", f"{ledger.captions_kept.total():,}")
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    for file, what in ledger.broken:
        console.print(f"broken: {file}: {what}", markup=False)


def list_dropped(
    folder: tyro.conf.Positional[Path],
    *,
    rule: str | None = None,
    level: str | None = None,
    source: str | None = None,
    limit: int = 20,
    as_json: bool = False,
) -> None:
    """List records and captions that a preparation left out, in the order of the input.

    Args:
        folder: output folder of the preparation.
        rule: only what this rule took; see the card or the counts for their names.
        level: record, or caption.
        source: only of this source.
        limit: entries shown; 0: all.
        as_json: one JSON object a line, with all fields.

    Raises:
        ValueError: no finished preparation there, or a rule that took nothing.
    """
    files = sorted((folder / "dropped").glob("dropped-*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no dropped/ of a finished preparation")
    wanted = ds.scalar(True)
    for name, value in (("rule", rule), ("level", level), ("source", source)):
        wanted = wanted if value is None else wanted & (ds.field(name) == value)
    found = ds.dataset(files)
    if rule is not None and not found.count_rows(filter=ds.field("rule") == rule):
        there = sorted(set(found.to_table(columns=["rule"])["rule"].to_pylist()))
        raise ValueError(f"rule {rule!r} took nothing; these did: {', '.join(there) or 'none'}")
    shown = 0
    for batch in found.scanner(filter=wanted, use_threads=False).to_batches():
        for row in batch.to_pylist():
            if limit and shown == limit:
                print(f"... of {found.count_rows(filter=wanted):,}")
                return
            shown += 1
            if as_json:
                print(json.dumps(row, ensure_ascii=False))
            else:
                print(f"{row['rule']} [{row['level']}] {row['key']}: {row['detail']}  | {row['text']}")
