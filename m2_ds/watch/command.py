"""`m2 watch` and `m2 profile`."""

from collections import Counter
from pathlib import Path

import tyro

from m2_ds.files import write_atomically
from m2_ds.watch.run import WatchedRun


def watch(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    *,
    once: bool = False,
    every: float = 2.0,
    web: bool = False,
    html: Path | None = None,
    prometheus: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Look at one run or several, while they go on or afterwards. Reads the run folders, and writes nothing into them.

    Args:
        runs: run folders; one that is not there yet is waited for.
        once: print once and end; what happens anyway where there is no terminal.
        every: seconds between two looks.
        web: a page with curves that goes on by itself, at http://HOST:PORT/, and /metrics for Prometheus.
        html: write the page as one file and end.
        prometheus: serve /metrics alone, on this port.
        host: address to listen on; other than this machine's own, everyone who reaches it can read.
        port: of the page; 0 takes a free one.
    """
    if not runs:
        raise ValueError("name at least one run folder, e.g. m2 watch runs/emoji")
    if every <= 0:
        raise ValueError(f"--every is {every}: seconds between two looks, above 0")
    chosen = [name for name, asked in (("--once", once), ("--web", web), ("--html", html),
              ("--prometheus", prometheus is not None)) if asked]  # fmt: skip
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} are given: choose one" + " (--web has /metrics)" * web)
    watched = [WatchedRun(folder) for folder in runs]
    same = Counter(run.name for run in watched)
    for run in watched:
        if same[run.name] > 1:
            run.name = str(run.folder)
    if html is not None:
        from m2_ds.watch.page import write_page

        write_page(watched, html)
        print(html)
    elif web or prometheus is not None:
        from m2_ds.watch.server import Answers, serve

        answers = Answers(watched, every, with_page=web)
        if web:
            serve(answers, host, port, "/")
        else:
            answers.paths["/metrics"]("")  # complain here where it cannot be answered
            serve(answers, host, prometheus or 0, "/metrics")
    else:
        from m2_ds.watch.terminal import show

        show(watched, every, once)


def profile(run: tyro.conf.Positional[Path], *, steps: int = 5, ranks: str = "0") -> None:
    """Ask a running job for a trace of its next steps by torch's profiler; it starts at its next log line.

    Args:
        run: run folder.
        steps: traced steps.
        ranks: which ranks write a trace, e.g. 0,3, or all.
    """
    from m2_ds.engine.profiling import REQUEST, parse_request

    if not (run / "config.yaml").exists():
        raise ValueError(f"{run} holds no config.yaml: it is no run folder, or its job has not begun")
    asked = f"{steps} {ranks.replace(' ', '')}"
    parse_request(asked)
    write_atomically(run / REQUEST, f"{asked}\n".encode())
    print(f"asked; the job starts at its next log line and writes to {run / 'profile'}")
