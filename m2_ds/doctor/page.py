"""The report as a page: on the terminal, as one HTML file, as JSON. Hosts that found the same share a line."""

import dataclasses
import datetime
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m2_ds.doctor.check import SECTIONS, Result, Status
from m2_ds.doctor.report import Report
from m2_ds.files import write_atomically, write_json

LOG_WIDTH = 120  # where there is no terminal to ask
MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("✔", "green"),
    "warn": ("!", "yellow"),
    "fail": ("✘", "bold red"),
    "skipped": ("–", "dim"),
}


@dataclass(frozen=True)
class Line:
    """Results of one check that are shown together."""

    name: str
    status: Status
    found: str
    remedy: str


def lines(results: list[Result]) -> Iterator[tuple[str, list[Line]]]:
    """(section, its lines) in the page's order. What is well on several hosts is one line; trouble is told by host."""
    hosts = len({result.where for result in results if result.where})
    for section in SECTIONS:
        by_name: dict[str, list[Result]] = {}
        for result in results:
            if result.section == section:
                by_name.setdefault(result.name, []).append(result)
        if by_name:
            yield section, [line for some in by_name.values() for line in _together(some, hosts)]


def _together(results: list[Result], hosts: int) -> Iterator[Line]:
    groups: dict[tuple[Status, str], list[Result]] = {}
    for one in results:
        groups.setdefault((one.status, one.remedy if one.status in ("warn", "fail") else ""), []).append(one)
    for (status, remedy), some in groups.items():
        found = some[0].found
        if hosts > 1 and some[0].where:
            names = list(dict.fromkeys(one.where for one in some))
            others = f" and {len(some) - 1} more host(s), like {names[-1]}" if len(some) > 1 else ""
            found = f"{names[0]}{others}: {found}"
        yield Line(some[0].name, status, found, remedy)


def verdict(report: Report) -> str:
    """One sentence: how many are red, yellow and green."""
    count = Counter(result.status for result in report.results)
    told = f"{count['fail']} red, {count['warn']} yellow, {count['ok']} green, {count['skipped']} not looked at"
    if count["fail"]:
        return f"{told}: the job would fail or compute nonsense; put the red ones right first"
    return f"{told}: " + ("it can start; the yellow ones cost time" if count["warn"] else "it can start")


def about(report: Report) -> str:
    hosts = list(dict.fromkeys(report.hosts))
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    return f"{report.recipe}, {report.world_size} rank(s) on {len(report.hosts)} host(s): {shown}"


def print_page(report: Report, console: Console | None = None) -> None:
    if console is None:
        narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
        console = Console(highlight=False, width=None if narrow else LOG_WIDTH)
    console.print(f"[bold]m2 doctor[/]  {escape(about(report))}")
    sections = list(lines(report.results))
    width = min(34, max((len(line.name) for _, some in sections for line in some), default=0))
    for section, some in sections:
        table = Table(box=None, show_header=False, padding=(0, 1), expand=False)
        table.add_column(width=1)
        table.add_column(style="bold", width=width)
        table.add_column(overflow="fold")
        for line in some:
            mark, style = MARKS[line.status]
            found = escape(line.found)
            if line.remedy:
                found += f"\n[{style}]→ {escape(line.remedy)}[/]"
            table.add_row(f"[{style}]{mark}[/]", escape(line.name), f"[dim]{found}[/]" if mark == "–" else found)
        console.print(f"\n[bold cyan]{section}[/]")
        console.print(table)
    style = "bold red" if report.failed else "bold green"
    console.print(f"\n[{style}]{escape(verdict(report))}[/]")


def write_html(report: Report, path: Path) -> None:
    """One file that needs nothing else."""
    environment = Environment(
        loader=PackageLoader("m2_ds.doctor"),
        autoescape=select_autoescape(default_for_string=True, default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("doctor.html.j2").render(
        about=about(report),
        verdict=verdict(report),
        failed=report.failed,
        sections=list(lines(report.results)),
        marks={status: mark for status, (mark, _) in MARKS.items()},
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())


def write_report(report: Report, path: Path) -> None:
    """Everything, as JSON: every result of every host, with the seconds that it took."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, as_json(report))


def as_json(report: Report) -> dict[str, Any]:
    content = {**dataclasses.asdict(report), "results": [result.model_dump() for result in report.results]}
    return {"ready": not report.failed, "verdict": verdict(report), **content}


def read_report(path: Path) -> Report:
    """What `write_report` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    results = [Result.model_validate(result) for result in content["results"]]
    return Report(content["recipe"], content["world_size"], content["hosts"], results)
