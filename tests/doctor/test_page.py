"""The page: complete, with remedies, hosts that agree on one line, and nothing that a name could break."""

import io
import json
from html.parser import HTMLParser
from pathlib import Path

from rich.console import Console

from m2_ds.doctor import page
from m2_ds.doctor.check import Result
from m2_ds.doctor.report import Report


def report() -> Report:
    results = [
        Result(section="machine", name="versions", status="ok", found="all in range", where=f"node{number}")
        for number in range(3)
    ]
    results += [
        Result(section="machine", name="open files", status="warn" if number == 1 else "ok", found=f"{number} files",
               remedy="ulimit -n" if number == 1 else "", where=f"node{number}")
        for number in range(3)
    ]  # fmt: skip
    results += [
        Result(
            section="network", name="connections", status="fail", found="[red]a</td><script>", remedy="open <ports>"
        ),
        Result(section="recipe", name="evaluation", status="skipped", found="no tasks", where="node0"),
    ]
    return Report("recipe.yaml", 24, ["node0", "node1", "node2"], results)


def printed(made: Report) -> str:
    out = io.StringIO()
    page.print_page(made, Console(file=out, width=160))
    return out.getvalue()


def test_terminal() -> None:
    text = printed(report())
    assert "recipe.yaml, 24 rank(s) on 3 host(s): node0, node1, node2" in text
    assert text.count("versions") == 1 and "node0 and 2 more host(s), like node2: all in range" in text
    assert (
        "node1: 1 files" in text and "→ ulimit -n" in text and "node0 and 1 more host(s), like node2: 0 files" in text
    )
    assert "[red]a</td><script>" in text and "→ open <ports>" in text
    assert text.index("machine") < text.index("recipe\n") < text.index("network\n")
    assert "1 red, 1 yellow, 5 green, 1 not looked at: the job would fail" in text


def test_verdicts() -> None:
    made = report()
    made.results = [result for result in made.results if result.status != "fail"]
    assert not made.failed and page.verdict(made).endswith("it can start; the yellow ones cost time")
    made.results = [result for result in made.results if result.status == "ok"]
    assert page.verdict(made).endswith("5 green, 0 not looked at: it can start")


def test_json_holds_everything(tmp_path: Path) -> None:
    page.write_report(report(), tmp_path / "new/report.json")
    content = json.loads((tmp_path / "new/report.json").read_text())
    assert content["ready"] is False and len(content["results"]) == 8
    assert page.read_report(tmp_path / "new/report.json") == report()


class Checked(HTMLParser):
    """Opened and closed tags, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_one_whole_file(tmp_path: Path) -> None:
    page.write_html(report(), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = Checked()
    parsed.feed(text)
    assert not parsed.open and "src=" not in text and "http" not in text
    assert "[red]a</td><script>" in parsed.text and "→ open <ports>" in parsed.text
    assert text.count('<tr class="fail">') == 1 and text.count('<tr class="warn">') == 1
