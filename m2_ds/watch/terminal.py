"""Runs on the terminal: one panel each, drawn again while they go on."""

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from m2_ds.watch.follow import thin
from m2_ds.watch.numbers import groups
from m2_ds.watch.run import Standing, State, WatchedRun, duration

COLOURS: dict[State, str] = {
    "waiting": "yellow",
    "running": "green",
    "quiet": "red",
    "ended": "red",
    "finished": "cyan",
    "gone": "red",
}
LEVELS = {"": "", "warn": "yellow", "bad": "bold red"}
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 60  # characters


def show(runs: Sequence[WatchedRun], every: float, once: bool) -> None:
    """Until all runs are finished, or Ctrl-C. Once, and plainly, where there is no terminal."""
    console = Console(highlight=False)
    if once or not console.is_terminal:
        for run in runs:
            run.refresh()
        if console.is_terminal:
            console.print(view(runs, time.time()))
        else:
            print_plainly(runs, console)
        return
    with Live(console=console, auto_refresh=False, transient=False) as live:
        try:
            while True:
                for run in runs:
                    run.refresh()
                live.update(view(runs, time.time()), refresh=True)
                if all(run.standing().state == "finished" for run in runs):
                    return
                time.sleep(every)
        except KeyboardInterrupt:
            return


def view(runs: Sequence[WatchedRun], now: float) -> RenderableType:
    return Group(*(_panel(run, now) for run in runs)) if len(runs) == 1 else _side_by_side(runs, now)


def progress(standing: Standing) -> str:
    """'step 120 of 400 (30%), 3 min to go'."""
    if standing.steps is None:
        return f"step {standing.step:,}"
    told = f"step {standing.step:,} of {standing.steps:,} ({100 * standing.step / standing.steps:.0f}%)"
    return f"{told}, {duration(standing.remaining_s)} to go" if standing.remaining_s else told


def curve(run: WatchedRun, name: str, width: int = CURVE) -> str:
    """A column as block characters, least to largest."""
    values = run.lines.get(name)
    rows = thin(values, width)
    if len(rows) < 2:
        return ""
    low, high = values[rows].min(), values[rows].max()
    places = (values[rows] - low) / (high - low) * (len(BLOCKS) - 1) if high > low else 0 * values[rows]
    return "".join(BLOCKS[round(float(x))] for x in places)


def _state(standing: Standing) -> str:
    return f"[{COLOURS[standing.state]}]● {standing.state}[/]  {escape(standing.words)}"


def _panel(run: WatchedRun, now: float) -> Panel:
    standing = run.standing(now)
    parts: list[RenderableType] = [Text.from_markup(f"{_state(standing)}  [dim]{progress(standing)}[/]")]
    if standing.steps:
        bar = Table.grid()
        bar.add_row(ProgressBar(total=standing.steps, completed=min(standing.step, standing.steps), width=CURVE))
        parts.append(bar)
    if line := curve(run, "loss"):
        parts.append(Text.from_markup(f"[cyan]{line}[/] [dim]loss[/]"))
    columns = Table.grid(padding=(0, 4))
    found = list(groups(run, now).items())
    for _ in range(2):
        columns.add_column(vertical="top")
    half = (sum(len(some) + 2 for _, some in found) + 1) // 2
    sides: list[list[RenderableType]] = [[], []]
    taken = 0
    for title, some in found:
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), title=None)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for number in some:
            table.add_row(escape(number.label), Text(number.text, style=LEVELS[number.level]))
        sides[taken >= half].extend([Text(f"\n{title}", style="bold cyan"), table])
        taken += len(some) + 2
    columns.add_row(Group(*sides[0]), Group(*sides[1]))
    parts.append(columns)
    parts += [Text(f"! {note}", style="yellow") for note in run.notes]
    return Panel(Group(*parts), title=escape(str(run.folder)), title_align="left", border_style="dim")


def _side_by_side(runs: Sequence[WatchedRun], now: float) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for run in runs:
        table.add_column(escape(run.name), overflow="fold")
    standings = [run.standing(now) for run in runs]
    table.add_row("", *(Text.from_markup(_state(one)) for one in standings))
    table.add_row("", *(Text(progress(one)) for one in standings))
    table.add_row(Text("loss", style="dim"), *(Text(curve(run, "loss", 24), style="cyan") for run in runs))
    every = [groups(run, now) for run in runs]
    for title in dict.fromkeys(title for one in every for title in one):
        table.add_row(Text(f"\n{title}", style="bold cyan"))
        cells = [{number.label: number for number in one.get(title, [])} for one in every]
        for label in dict.fromkeys(label for some in cells for label in some):
            row = [some.get(label) for some in cells]
            shown = [Text(x.text, style=LEVELS[x.level]) if x else Text("–", style="dim") for x in row]
            table.add_row(Text(label, style="dim"), *shown)
    notes = [Text(f"! {run.name}: {note}", style="yellow") for run in runs for note in run.notes]
    return Group(table, *notes)


def print_plainly(runs: Sequence[WatchedRun], console: Console) -> None:
    """For logs and pipes: a line a number."""
    now = time.time()
    for run in runs:
        standing = run.standing(now)
        lines = [str(run.folder), f"  {standing.state}: {standing.words}", f"  {progress(standing)}"]
        for title, some in groups(run, now).items():
            width = max(len(number.label) for number in some)
            lines += [f"  {title:<10}  {number.label.ljust(width)}  {number.text}" for number in some]
        lines += [f"  note: {note}" for note in run.notes]
        console.print("\n".join(lines), markup=False, soft_wrap=True)
