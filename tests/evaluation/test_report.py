"""The page: whole, from parts, safe, self-contained, small; and its curves."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from m2_ds.evaluation import report
from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.evaluation.plots import MAX_POINTS, Series, chart, thin
from m2_ds.evaluation.report import write_report
from m2_ds.evaluation.run import evaluate

VOID = {"meta", "link", "br", "img", "hr"}


class Checker(HTMLParser):
    """Collects text, ids, classes and addresses; fails on tags that don't close."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.addresses, self.text, self.problems = [], [], [], [], []
        self.feed(page)
        self.close()
        self.problems += self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "srcset", "action", "data", "xlink:href"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.problems.append((tag, name))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}>")

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def run_dir(model, processor, colours, tmp_path):
    folder = tmp_path / "my-run"
    config = EvaluationConfig(
        batch_size=4,
        tasks=[
            {"kind": "retrieval", "dataset": colours.folder, "splits": ["test"], "caption_kinds": ["name"]},
            {"kind": "hard_negatives", "dataset": colours.folder, "splits": ["test"]},
        ],
    )
    evaluate(model, processor, config, folder, facts={"model": "a/b"})
    lines = [
        {
            "step": step,
            "samples": step * 64,
            "loss": 5 / step,
            "loss/en": 2 / step,
            "loss/zh": 3 / step,
            "lr": 1e-3,
            "grad_norm": None if step == 2 else 1.5,
            "samples_per_s": 100.0,
            "step_s": 0.64,
            "data_wait_share": 0.01,
        }
        for step in range(1, 41)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 41, "lo', encoding="utf-8")
    (folder / "evaluation").mkdir()
    for step in (100, 20):
        metrics = {
            f"colours/test/{lang}/{way}/r1": step / 4
            for lang in ("en", "zh")
            for way in ("text_to_image", "image_to_text")
        }
        (folder / f"evaluation/step-{step:08}.json").write_text(json.dumps({"step": step, "metrics": metrics}))
    tree = {
        "seed": 3,
        "global_batch": 64,
        "data": {"sources": [{"path": "data/colours"}]},
        "note": "<script>x</script>",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu", "world_size": 2, "cpus": 2, "memory_gb": 8}))
    return folder


def page_of(folder):
    return write_report(folder).read_text(encoding="utf-8")


def test_a_whole_page_is_sound_and_self_contained(run_dir):
    page = page_of(run_dir)
    found = Checker(page)
    assert found.problems == []
    assert len(found.ids) == len(set(found.ids)), "ids of charts must not meet"
    assert all(address.startswith(("#", "data:")) for address in found.addresses)
    assert {address[1:] for address in found.addresses if address.startswith("#")} <= set(found.ids)
    assert "http" not in page and "@import" not in page and "<script" not in page
    assert all(uri.startswith("data:image/webp") for uri in re.findall(r"url\((?!#)([^)]*)\)", page))
    # Every picture that is shown has its thumbnail in the style sheet.
    shown = set(re.findall(r'<i class="(g\d+-\d+)">', page))
    assert shown and shown <= set(re.findall(r"\.(g\d+-\d+)\{background-image", page))
    # A shorthand in the more specific rule would take the picture away again.
    assert not re.search(r"\.thumb i \{[^}]*background:", page)


def test_what_the_page_says(run_dir):
    text = " ".join(" ".join(Checker(page_of(run_dir)).text).split())
    assert "my-run" in text and "trained on 2,560 image-text pairs in 40 steps (26 s)" in text
    assert "on 2 CPU processes" in text
    for section in ("Recall", "Curves", "Hard negatives", "Gallery", "Worst mistakes", "How it was made"):
        assert section in text
    assert "红色方块" in text and "a red square" in text
    assert "<script>x</script>" in text, "what users wrote is shown as text"
    assert text.count("100.0") >= 12


@pytest.mark.parametrize("kept", ["log.jsonl", "details.json", "evaluation"])
def test_any_part_alone_makes_a_page(run_dir, kept):
    for path in list(run_dir.iterdir()):
        if path.name != kept:
            if path.is_dir():
                for inner in path.iterdir():
                    inner.unlink()
                path.rmdir()
            else:
                path.unlink()
    page = page_of(run_dir)
    assert Checker(page).problems == []
    assert ("<svg" in page) == (kept != "details.json") and ("Gallery" in page) == (kept == "details.json")


def test_nothing_to_show_and_damage_are_told(run_dir, tmp_path):
    with pytest.raises(ValueError, match="nothing to report on"):
        write_report(tmp_path)
    (run_dir / "details.json").write_text("{")
    with pytest.raises(ValueError, match=r"details\.json is damaged"):
        write_report(run_dir)


def test_galleries_beyond_the_page_are_left_out_and_named(run_dir, monkeypatch):
    monkeypatch.setattr(report, "PICTURE_BYTES", 10)
    page = page_of(run_dir)
    assert "data:image/webp" not in page
    assert "Left out to keep this page small: colours/test" in page


def test_a_chart_has_every_line_and_no_colour_of_its_own():
    lines = [Series("a", [1, 2, 3], [1.0, 4.0, 2.0]), Series("b", [1, 2], [2.0, 3.0], 1, 1), Series("c", [], [], 2)]
    svg = chart(lines, name="x", log=True)
    assert svg.count("stroke: var(--series-0)") and svg.count("stroke: var(--series-1)")
    assert "--series-2" not in svg and not re.findall(r"(?:stroke|fill): #", svg)
    assert "font-family" not in svg and "http" not in svg
    assert set(re.findall(r"url\(#([^)]*)\)", svg)) <= set(re.findall(r'id="([^"]*)"', svg))
    assert chart([Series("c", [], [])], name="x") == ""
    assert chart(lines, name="x", log=True) == svg


def test_thinning_keeps_the_ends_and_the_mean():
    line = thin(Series("a", list(range(1000)), [float(i) for i in range(1000)]))
    assert len(line.x) == MAX_POINTS and line.x[0] < 5 and line.x[-1] > 994
    assert sum(line.y) / len(line.y) == pytest.approx(499.5, abs=1)
