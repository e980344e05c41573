"""An object store on this machine: a folder behind HTTP with ranges, which can be told to fail; and its fsspec driver.

with Store(folder) as store:
    open_dataset(store.url)
"""

import contextlib
import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import fsspec

TIMEOUT_S = 2.0


class Asked:
    """One request: file, first byte and the one past the last (None: whole), a number counting from 0."""

    def __init__(self, file: str, start: int | None, stop: int | None, number: int) -> None:
        self.file, self.start, self.stop, self.number = file, start, stop, number


class Store:
    """Serves a folder. ``fail`` answers a request with an HTTP code, "cut" (half the bytes) or None (as it should)."""

    def __init__(self, folder: Path, fail: Callable[[Asked], int | str | None] = lambda _: None) -> None:
        self.folder, self.fail = folder, fail
        self.asked: list[Asked] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        fsspec.register_implementation("web", WebFileSystem, clobber=True)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"web://127.0.0.1:{self._server.server_address[1]}/set"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def bytes_of(self, file: str) -> int:
        """Asked of files of that name."""
        return sum((a.stop or 0) - (a.start or 0) for a in self.asked if file in a.file)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        store = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = store.folder / self.path.removeprefix("/set/")
                ranged = self.headers.get("Range")
                start = stop = None
                if ranged:
                    first, last = ranged.removeprefix("bytes=").split("-")
                    start, stop = int(first), int(last) + 1
                with store._lock:
                    asked = Asked(self.path.removeprefix("/set/"), start, stop, len(store.asked))
                    store.asked.append(asked)
                fault = store.fail(asked)
                if isinstance(fault, int) or not path.is_file():
                    self.send_error(fault if isinstance(fault, int) else 404)
                    return
                content = path.read_bytes()[start:stop]
                self.send_response(206 if ranged else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    with contextlib.suppress(BrokenPipeError):  # the other side may have stopped waiting
                        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

        return Handler


class WebFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Reading by plain HTTP/1.0 requests."""

    protocol = "web"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("web://")

    def _request(self, method: str, path: str, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
        host, _, rest = self._strip_protocol(path).partition("/")
        connection = http.client.HTTPConnection(host, timeout=TIMEOUT_S)
        try:
            connection.request(method, f"/{rest}", headers=headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status == 404:
            raise FileNotFoundError(path)
        if response.status >= 400:
            raise OSError(f"HTTP {response.status}")
        return response, content

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        headers = {} if start is None else {"Range": f"bytes={start}-{(end or 0) - 1}"}
        return self._request("GET", path, headers)[1]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        response, _content = self._request("HEAD", path, {})
        return {"name": path, "size": int(response.headers["Content-Length"]), "type": "file"}
