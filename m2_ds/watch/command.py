"""`m2 watch`."""

from pathlib import Path

import tyro

from m2_ds.watch.run import WatchedRun


def watch(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    *,
    once: bool = False,
    every: float = 2.0,
) -> None:
    """Look at one run or several, while they go on or afterwards. Reads the run folders, and writes nothing into them.

    Args:
        runs: run folders; one that is not there yet is waited for.
        once: print once and end; what happens anyway where there is no terminal.
        every: seconds between two looks.
    """
    if not runs:
        raise ValueError("name at least one run folder, e.g. m2 watch runs/emoji")
    if every <= 0:
        raise ValueError(f"--every is {every}: seconds between two looks, above 0")
    watched = [WatchedRun(folder) for folder in runs]
    from m2_ds.watch.terminal import show

    show(watched, every, once)
