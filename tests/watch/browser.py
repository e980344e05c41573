"""A page as Chromium builds it: the document after its scripts have run."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")


class Document(HTMLParser):
    """Texts by id (of the element and what is in it), attributes by id, and everything that is loaded."""

    VOID = {"meta", "link", "br", "input", "img", "hr", "path"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.attributes: dict[str, dict[str, str | None]] = {}
        self.loaded: list[str] = []
        self._open: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        name = found.get("id") or (tag if tag == "body" else None)
        if name:
            self.attributes[name] = found
            self.texts[name] = ""
        self.loaded += [url for key in ("src", "href") if (url := found.get(key)) and not url.startswith("#")]
        if tag not in self.VOID:
            self._open.append((tag, name))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, name in self._open:
            if name:
                self.texts[name] += f"{data} "


def opened(url: str, folder: Path, virtual_s: float = 10.0) -> Document:
    """After that many seconds of the page's own clock, which stands still while it waits for a server."""
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1300,900", f"--virtual-time-budget={int(1000 * virtual_s)}", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    return Document(done.stdout)
