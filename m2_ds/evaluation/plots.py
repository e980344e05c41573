"""Curves as inline SVG, without colours or fonts of their own: the page's style sheet decides them."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

MAX_POINTS = 240
# Colours that stand in the SVG for what the style sheet calls them.
_INK = "#010203"
_COLOURS = [f"#01020{i}" for i in range(4, 10)]


@dataclass(frozen=True)
class Series:
    """One line: `colour` and `dash` are small numbers, equal ones look alike on every chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: int = 0


def chart(series: Sequence[Series], *, name: str, log: bool = False, from_zero: bool = False) -> str:
    """An <svg> element; `name` keeps its ids apart from other charts of the page. Empty without points."""
    drawn = [thin(line) for line in series if len(line.x)]
    if not drawn:
        return ""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=(4.9, 2.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for line in drawn:
            axes.plot(
                line.x,
                line.y,
                color=_COLOURS[line.colour % len(_COLOURS)],
                linestyle=("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1, 2)))[line.dash % 4],
                linewidth=1.6,
                marker="o" if len(line.x) <= 12 else None,
                markersize=3.5,
            )
        if log:
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        axes.grid(True, axis="y", color=_INK, alpha=0.12, linewidth=0.7)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_INK)
        axes.spines["bottom"].set_alpha(0.35)
        axes.tick_params(which="both", length=0, labelcolor=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)) if log else MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.yaxis.set_minor_locator(NullLocator())
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(content.getvalue(), name)


def thin(line: Series) -> Series:
    """At most MAX_POINTS points: means over stretches of equal number."""
    n = len(line.x)
    if n <= MAX_POINTS:
        return line
    edges = [round(i * n / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    stretches = [slice(a, b) for a, b in zip(edges, edges[1:])]
    x, y = ([sum(values[s]) / (s.stop - s.start) for s in stretches] for values in (line.x, line.y))
    return Series(line.label, x, y, line.colour, line.dash)


def _short(value: float) -> str:
    """1500 -> 1.5k, 0.00075 -> 7.5e-4."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def _inline(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box
    svg = f'<svg {view_box[0]} aria-hidden="true">' + svg[svg.index(">") + 1 :]  # the page sets the size
    # Ids of figures, axes and lines are counted from 1 in every chart.
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#|(?:xlink:)?href=\"#", lambda found: f"{found[0].removeprefix('xlink:')}{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for number, colour in enumerate(_COLOURS):
        svg = svg.replace(colour, f"var(--series-{number})")
    return svg.replace(_INK, "currentColor")
