"""The page, its numbers, and the same for Prometheus, over HTTP. Four fixed paths, read only; for this machine alone
unless told otherwise.
"""

import gzip
import json
import logging
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from m2_ds.watch import page
from m2_ds.watch.run import WatchedRun

log = logging.getLogger(__name__)

SMALL = 1400  # bytes that one packet carries: not worth compressing
LOCAL = ("127.0.0.1", "localhost", "::1")
# Scripts and styles stand in the page; nothing may come from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'"
)


class Answers:
    """What each path gives: (content type, bytes). Several requests at a time share one reading of the folders."""

    def __init__(self, runs: list[WatchedRun], every: float, with_page: bool = True) -> None:
        self.runs, self.every = runs, every
        self._lock = threading.Lock()
        self.fresh_s = every / 2  # for so long what was read is new enough
        self._read = 0.0
        self.paths: dict[str, Callable[[str], tuple[str, bytes]]] = {"/metrics": self._metrics}
        if with_page:
            self._plotly = page.plotly_js().encode()
            self.paths |= {"/": self._page, "/data": self._data, "/plotly.min.js": self._library}

    def _refresh(self) -> None:
        if time.monotonic() - self._read > self.fresh_s:
            for run in self.runs:
                run.refresh()
            self._read = time.monotonic()

    def _page(self, _: str) -> tuple[str, bytes]:
        return "text/html; charset=utf-8", page.render(self.runs, self.every).encode()

    def _library(self, _: str) -> tuple[str, bytes]:
        return "text/javascript; charset=utf-8", self._plotly

    def _data(self, query: str) -> tuple[str, bytes]:
        have: dict[int, int] = {}
        for pair in parse_qs(query).get("have", [""])[0].split(","):
            place, _, version = pair.partition(":")
            if place.isdecimal() and version.isdecimal():
                have[int(place)] = int(version)
        with self._lock:
            self._refresh()
            told = page.state(self.runs, have)
        return "application/json", json.dumps(told, ensure_ascii=False, allow_nan=False).encode()

    def _metrics(self, _: str) -> tuple[str, bytes]:
        from m2_ds.watch.prometheus import exposition

        with self._lock:
            self._refresh()
            return exposition(self.runs, time.time())


def server(answers: Answers, host: str, port: int) -> ThreadingHTTPServer:
    """Bound, not yet answering. Raises ValueError where the address cannot be had."""
    only_here = host in LOCAL

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            # A page from elsewhere may give its own name this machine's address, and would then read along.
            named = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if only_here and named not in LOCAL:
                self.send_error(403, "ask by localhost or 127.0.0.1")
                return
            path, _, query = self.path.partition("?")
            answer = answers.paths.get(path)
            if answer is None:
                self.send_error(404)
                return
            try:
                kind, content = answer(query)
            except ValueError as error:  # what this installation cannot answer
                self.send_error(501, str(error)[:200])
                return
            except Exception as error:  # the page says so, and asks again
                log.exception("%s", path)
                self.send_error(500, f"{type(error).__name__}"[:80])
                return
            self.send_response(200)
            if len(content) > SMALL and "gzip" in self.headers.get("Accept-Encoding", ""):
                content = gzip.compress(content, 5)
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "max-age=3600" if path.endswith(".js") else "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Security-Policy", POLICY)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A browser that went away in the middle of an answer is no news."""

    try:
        return Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen on {host}, port {port} ({error}); --port 0 takes a free one, --host names another address"
        ) from None


def serve(answers: Answers, host: str, port: int, path: str) -> None:
    """Answer until Ctrl-C. ``path``: which one is told."""
    with server(answers, host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{listening.server_address[1]}{path}    (Ctrl-C ends it)", flush=True)
        try:
            listening.serve_forever(0.2)
        except KeyboardInterrupt:
            print()
