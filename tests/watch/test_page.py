"""The page: what it is told, what its server gives and refuses, and what a browser makes of it."""

import gzip
import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from m2_ds.watch import page
from m2_ds.watch.command import watch
from m2_ds.watch.curves import POINTS, curves, differences
from m2_ds.watch.run import WatchedRun
from m2_ds.watch.server import Answers, server
from tests.watch.browser import Document, needs_chromium, opened
from tests.watch.folders import Folder, line


def watched(*folders: Path) -> list[WatchedRun]:
    runs = [WatchedRun(folder) for folder in folders]
    for run in runs:
        run.refresh()
    return runs


@contextmanager
def answering(answers: Answers) -> Iterator[int]:
    """A server on a free port."""
    with server(answers, "127.0.0.1", 0) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield listening.server_address[1]
        finally:
            listening.shutdown()
            thread.join()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_curves_of_a_long_run_are_short_and_keep_its_spike(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run", steps=25_000)
    folder.log(*(line(step, loss=99.0 if step == 11_313 else 2.0, skipped={"broken": 3}) for step in range(1, 20_001)))
    folder.evaluate(10_000, en=40.0).evaluate(20_000, en=50.0, zh=45.0)
    (run,) = watched(folder.path)
    started = time.perf_counter()
    found = curves(run)
    assert time.perf_counter() - started < 10 and len(json.dumps(found)) < 1_000_000
    (loss,) = found["series"]["loss"]
    assert len(loss["i"]) <= POINTS
    at = [found["rows"]["step"][i] for i in loss["i"]]
    assert (at[0], at[-1]) == (1, 20_000) and loss["y"][at.index(11_313)] == 99.0
    assert [one["label"] for one in found["series"]["levels"]] == ["contrastive, unimodal", "contrastive, vl"]
    en, zh = found["series"]["recall"]
    assert (en["y"], zh["y"]) == ([40.0, 50.0], [45.0])
    assert [found["evaluations"]["samples"][i] for i in zh["i"]] == [32 * 20_000]
    assert found["series"]["skipped"][0]["y"][0] == 3 and len(found["series"]["skipped"]) == 1


def test_the_axes(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run").log(line(10), line(20), line(30, time=4612.5))  # an hour of something else
    (run,) = watched(folder.path)
    rows = curves(run)["rows"]
    assert rows["step"] == [10, 20, 30] and rows["samples"] == [320, 640, 960]
    assert np.allclose(rows["trained"], [5 / 3600, 10 / 3600, 15 / 3600])
    assert np.allclose(rows["clock"], [5 / 3600, 10 / 3600, 1 + 12.5 / 3600])
    old = Folder(tmp_path / "old").log(line(10, time=None), line(20, time=None))
    (run,) = watched(old.path)
    assert curves(run)["rows"]["clock"] == curves(run)["rows"]["trained"]


def test_only_fields_that_differ_are_told(tmp_path: Path) -> None:
    one = Folder(tmp_path / "one", optim={"lr": 1e-3, "betas": [0.9, 0.98]}, data={"sources": [{"path": "a"}]})
    two = Folder(
        tmp_path / "two", optim={"lr": 2e-3, "betas": [0.9, 0.98]}, data={"sources": [{"path": "b"}]}, lora=None
    )
    two.write("environment.json", {"world_size": 8, "cpus": 3})
    found = differences(watched(one.path, two.path))
    assert {row["field"]: row["values"] for row in found} == {
        "optim.lr": ["0.001", "0.002"],
        "data.sources.0.path": ["a", "b"],
        "lora": ["–", "none"],
        "environment: world_size": ["–", "8"],
    }
    assert differences(watched(one.path)) == []


def test_the_server_gives_what_is_new_and_nothing_else(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run").log(line(10))
    with answering(Answers([WatchedRun(folder.path), WatchedRun(tmp_path / "none")], every=0.0)) as port:
        status, headers, content = ask(port, "/data", **{"Accept-Encoding": "gzip"})
        assert status == 200 and headers["Content-Encoding"] == "gzip"
        told = json.loads(gzip.decompress(content))
        assert told["curves"].keys() == {"0", "1"} and told["runs"][1]["state"] == "waiting"
        have = ",".join(f"{n}:{run['version']}" for n, run in enumerate(told["runs"]))
        assert json.loads(ask(port, f"/data?have={have}")[2])["curves"] == {}
        folder.log(line(20), "{broken\n")
        told = json.loads(ask(port, f"/data?have={have}")[2])
        assert told["curves"].keys() == {"0"} and told["curves"]["0"]["rows"]["step"] == [10, 20]
        assert "1 damaged line(s)" in told["runs"][0]["notes"][0]
        assert json.loads(ask(port, "/data?have=9:9,x,1:y,::&have=")[2])["curves"].keys() == {"0", "1"}
        status, headers, content = ask(port, "/")
        assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
        assert Document(content.decode()).loaded == ["data:,", "plotly.min.js"]
        assert len(ask(port, "/plotly.min.js")[2]) > 1_000_000
        assert ask(port, "/", "HEAD")[2] == b""
        for path in (
            "/../run/log.jsonl",
            "/%2e%2e/etc/passwd",
            "//etc/passwd",
            "/log.jsonl",
            "/data/../../x",
            "/page.py",
        ):
            assert ask(port, path)[0] == 404
        assert ask(port, "/", "POST")[0] == 501
        assert ask(port, "/data", Host="evil.example")[0] == 403
        assert ask(port, "/data", Host=f"localhost:{port}")[0] == 200
        with pytest.raises(ValueError, match="--port 0 takes a free one"):
            server(Answers([], 1.0, with_page=False), "127.0.0.1", port)


def test_prometheus_reads_the_newest_numbers(tmp_path: Path) -> None:
    folder = Folder(tmp_path / 'a "run"').log(line(10), line(20, mfu=None, skipped={"broken picture": 4}))
    folder.evaluate(20, en=41.5)
    answers = Answers([WatchedRun(folder.path), WatchedRun(tmp_path / "none")], every=0.0, with_page=False)
    with answering(answers) as port:
        status, headers, content = ask(port, "/metrics")
        assert ask(port, "/")[0] == 404
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    samples = {
        (sample.name, sample.labels.pop("run"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }
    run = 'a "run"'
    assert samples["m2_samples_per_second", run] == 64.0
    assert samples["m2_steps_total", run] == 20 and samples["m2_steps_total", "none"] == 0
    assert samples["m2_steps_goal", run] == 100
    assert samples["m2_loss_part", run, "zh"] == 4.1
    assert samples["m2_skipped_pairs_total", run, "broken picture"] == 4
    assert samples["m2_evaluation_percent", run, "shapes/val/en"] == 41.5
    assert samples["m2_state", "none", "waiting"] == 1 and samples["m2_state", run, "waiting"] == 0
    assert not [key for key in samples if key[0] == "m2_mfu_ratio" or (key[0] == "m2_loss" and key[1] == "none")]


def test_the_file_is_whole_and_what_a_run_says_cannot_break_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path / "x<script>alert(1)<!--", tokenizer="</script><b>").log(line(10, loss=float("inf")))
    other = Folder(tmp_path / "sub" / folder.path.name, tokenizer="b").log(line(10))
    watch((folder.path, other.path), html=tmp_path / "pages/page.html")
    assert capsys.readouterr().out.strip().endswith("page.html")
    html = (tmp_path / "pages/page.html").read_text()
    document = Document(html)
    assert document.loaded == ["data:,"]
    told: dict[str, Any] = json.loads(document.texts["settings"])
    assert [run["name"] for run in told["state"]["runs"]] == [str(folder.path), str(other.path)]
    assert {row["field"] for row in told["state"]["differences"]} == {"tokenizer"}
    assert html.count("<script>alert") == 0 and len(html) < 6_000_000
    with pytest.raises(ValueError, match="nothing to draw"):
        watch((tmp_path / "none",), html=tmp_path / "page.html")
    with pytest.raises(ValueError, match="--web and --html are given"):
        watch((folder.path,), html=tmp_path / "page.html", web=True)


@needs_chromium
def test_a_browser_follows_a_run(tmp_path: Path) -> None:
    """Lines, a damaged one, an evaluation and another run come while the page is open; then the server fails."""
    folder = Folder(tmp_path / "run").log(line(10), line(20))
    late = tmp_path / "late"
    asked: list[dict[int, int]] = []
    original = page.state

    def state(runs: list[WatchedRun], have: dict[int, int]) -> dict[str, Any]:
        told = original(runs, have)
        asked.append(have)
        if len(asked) == 2:  # behind this look: the next one sees it
            folder.log(line(30, loss=1.25), "{broken\n").evaluate(30, en=43.5)
            Folder(late, steps=500).log(line(5))
        if len(asked) > 4:
            raise RuntimeError("no more")
        return told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "state", state)
        answers = Answers([WatchedRun(folder.path), WatchedRun(late)], every=0.5)
        answers.fresh_s = 0.0  # the browser's clock runs faster than ours
        with answering(answers) as port:
            document = opened(f"http://127.0.0.1:{port}/", tmp_path, virtual_s=4)
    assert len(asked) >= 3 and asked[0] == {} and asked[1].keys() == {0, 1}
    assert document.attributes["body"]["data-renders"] == "2"  # at first, and when there was something new
    assert document.attributes["chart-loss"]["data-last"] == "30 1.25"
    assert document.attributes["chart-loss"]["data-points"] == "3 1"
    assert document.attributes["chart-recall"]["data-last"] == "30 43.5"
    assert "step 30 of 100 (30%)" in document.texts["runs"] and "step 5 of 500 (1%)" in document.texts["runs"]
    assert "1 damaged line(s) left out" in document.texts["runs"]
    assert "43.5%" in document.texts["numbers"] and "steps" in document.texts["differences"]
    assert "the server answers 500" in document.texts["trouble"] and "hidden" not in document.attributes["trouble"]
    assert "contrastive, unimodal" in document.texts["chart-levels"] and "chart-masked" not in document.attributes


@needs_chromium
def test_a_browser_draws_the_file_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run").log(*(line(step) for step in range(1, 2001)))
    folder.write("anomalies.jsonl", '{"step": 700, "reason": "<b>spike</b>"}\n')
    watch((folder.path,), html=tmp_path / "page.html")
    document = opened(f"{(tmp_path / 'page.html').as_uri()}?axis=samples&theme=dark", tmp_path, virtual_s=2)
    assert document.attributes["chart-loss"]["data-last"] == "64000 -12"
    assert (
        document.attributes["chart-loss"]["data-points"] == "598"
    )  # least and largest of 298 stretches, first and last
    assert "1, last at step 700: <b>spike</b>" in document.texts["numbers"]
    assert document.attributes["trouble"].keys() >= {"hidden"}
