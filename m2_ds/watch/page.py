"""The page: one template, filled by a server that goes on answering, or with everything in it."""

import datetime
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from m2_ds.files import write_atomically
from m2_ds.watch.curves import AXES, charts, curves, differences, summary
from m2_ds.watch.run import WatchedRun


def plotly_js() -> str:
    """The drawing library, as the Python package carries it. Raises ValueError where that is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError("the page is drawn by plotly, which is not installed: pip install plotly") from None
    return str(get_plotlyjs())


def asset(name: str) -> str:
    return (files("m2_ds.watch") / "templates" / name).read_text(encoding="utf-8")


def state(runs: list[WatchedRun], have: dict[int, int], now: float | None = None) -> dict[str, Any]:
    """What the page is told. ``have``: versions of runs, by place, whose curves it holds already."""
    now = time.time() if now is None else now
    return {
        "runs": [summary(run, now) for run in runs],
        "curves": {str(n): curves(run) for n, run in enumerate(runs) if have.get(n) != run.version},
        "differences": differences(runs),
        "read": datetime.datetime.fromtimestamp(now).astimezone().strftime("%Y-%m-%d %H:%M:%S"),
    }


def render(runs: list[WatchedRun], poll_s: float | None) -> str:
    """``poll_s``: seconds between two looks at the server; None: a page of its own, with all numbers in it."""
    environment = Environment(
        loader=PackageLoader("m2_ds.watch"),
        autoescape=select_autoescape(default_for_string=True, default=True),
        undefined=StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    alone = poll_s is None
    return environment.get_template("page.html.j2").render(
        title=", ".join(run.name for run in runs),
        css=asset("page.css"),
        js=asset("page.js"),
        plotly=plotly_js() if alone else None,
        settings={
            "poll_s": poll_s,
            "axes": list(AXES.items()),
            "charts": charts(),
            "state": state(runs, {}) if alone else None,
        },
    )


def write_page(runs: list[WatchedRun], path: Path) -> None:
    """One file that needs nothing else."""
    for run in runs:
        run.refresh()
        if not len(run.lines):
            raise ValueError(f"{run.folder} has no log.jsonl with a line in it: there is nothing to draw")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(runs, None).encode())
