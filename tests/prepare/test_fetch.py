"""Pictures behind URLs, from a server of the test's own: what comes, what does not, and that nothing waits for ever."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from m2_ds.prepare.config import FetchConfig
from m2_ds.prepare.fetch import fetch_pictures, local_file
from m2_ds.prepare.pairs import Drop
from m2_ds.prepare.readers import BrokenShard
from tests.prepare.raw import caption, image, prepare, rules, tars

QUICK = FetchConfig(seconds=1.0, retries=1, threads=4)


class _Handler(BaseHTTPRequestHandler):
    asked: Counter[str] = Counter()

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        if self.path.startswith("/slow"):
            self.send_response(200)
            self.end_headers()
            for _ in range(30):  # never silent for long, and never done
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
            return
        status = 404 if "missing" in self.path else 200
        if self.path.startswith("/shaky") and self.asked[self.path] == 1:
            status = 503
        body = b"x" * 20_000 if "large" in self.path else image(int(self.path[-1])) if self.path[-1].isdigit() else b""
        self.send_response(status)
        if "unsaid" not in self.path:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    _Handler.asked = Counter()
    made = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    made.block_on_close = False  # the slow answers go on by themselves
    made.handle_error = lambda *_: None  # type: ignore[method-assign, misc, assignment]
    thread = threading.Thread(target=partial(made.serve_forever, poll_interval=0.02))
    thread.start()
    yield f"http://127.0.0.1:{made.server_address[1]}"
    made.shutdown()
    thread.join()
    made.server_close()


def test_what_comes_and_what_does_not(server: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    urls = ["/1", "/missing", "/shaky/2", "/large", "/large-unsaid", "/slow"]
    start = time.monotonic()
    found = fetch_pictures([*(server + url for url in urls), f"file://{tmp_path}/secret", "no url"], QUICK, 10_000)
    assert time.monotonic() - start < 8
    assert found[0] == image(1) and found[2] == image(2)
    told = [(drop.rule, drop.detail) for drop in found if isinstance(drop, Drop)]
    assert [rule for rule, _ in told] == ["not_fetched", "too_many_bytes", "too_many_bytes", *["not_fetched"] * 3]
    for words, (_, detail) in zip(["404", "10,000", "10,000", "1 s", "file protocol", "protocol"], told):
        assert words in detail
    assert _Handler.asked["/missing"] == 1 and _Handler.asked["/slow"] == 2


def test_nobody_answers() -> None:
    (found,) = fetch_pictures(["http://127.0.0.1:9/1"], QUICK, 10_000)
    assert isinstance(found, Drop) and found.rule == "not_fetched"


def test_records_with_urls(server: str, tmp_path: Path) -> None:
    rows = [f"{server}/{number},{caption(number)}" for number in range(3)]
    (tmp_path / "a.csv").write_text("\n".join(['url,"caption"', *(row.replace(", ", " ") for row in rows)]))
    with pytest.raises(ValueError, match="set `fetch` to download"):
        prepare(tmp_path / "no", str(tmp_path / "a.csv"), "csv")
    _, records = prepare(tmp_path / "out", str(tmp_path / "a.csv"), "csv", fetch={"seconds": 5})
    assert [record.image for record in records] == [image(number) for number in range(3)]
    assert not rules(tmp_path / "out")


def test_input_files_from_an_object_store(tmp_path: Path) -> None:
    tars(tmp_path / "in", 8, each=4)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "in"), "/bucket/in", recursive=True)
    _, here = prepare(tmp_path / "here", str(tmp_path / "in" / "*.tar"))
    _, there = prepare(tmp_path / "there", "memory://bucket/in/*.tar")
    assert len(there) == 8 and there == here
    with pytest.raises(FileNotFoundError), local_file("memory://bucket/none.tar", 0):
        pass
    with pytest.raises(BrokenShard, match="can't be copied"), local_file("nosuchprotocol://x/a.tar", 0):
        pass
