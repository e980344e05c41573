"""The run folder's disk, as one host sees it: free, fast enough for checkpoints, of the same clock, and held by no one.

Nothing is left behind: a folder that does not exist yet is judged by the nearest one above it.
"""

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from m2_ds.config import RunConfig
from m2_ds.convert.run_folder import CHECKPOINTS, checkpoint_steps
from m2_ds.doctor.check import Check, Verdict, fail, ok, rate, size, warn
from m2_ds.doctor.sizes import checkpoint_bytes, kept_checkpoints, numbers

SAMPLE = 64 << 20  # bytes written and read for the disk's speed
SLOW_CHECKPOINT_S = 300.0
CLOCK_WARN_S, CLOCK_FAIL_S = 2.0, 60.0
_HANG = "the file system does not answer: look at its mount on this host (a dead NFS server, a full queue)"


def checks(config: RunConfig) -> list[Check]:
    found = [
        Check("disk", "run folder", lambda: run_folder(config), hang=_HANG),
        Check("disk", "space", lambda: space(config), limit_s=60, hang=_HANG),
        Check("disk", "speed", lambda: speed(config), limit_s=120, hang=_HANG),
        Check("disk", "file clock", lambda: file_clock(config.folder), hang=_HANG),
    ]
    if config.data.cache_folder is not None:
        found.append(Check("disk", "data cache", lambda: data_cache(config), hang=_HANG))
    return found


def nearest(folder: Path) -> Path:
    """The folder itself, or the closest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A path in the nearest folder for a file that is gone afterwards. Raises ValueError where none can be written."""
    place = nearest(folder)
    path = place / f".m2-doctor-{uuid.uuid4().hex}"
    try:
        yield path
    except OSError as error:
        raise ValueError(
            f"{place} cannot be written to ({error.strerror or error}); correct its permissions or quota, or set "
            "folder=... to another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def run_folder(config: RunConfig) -> Verdict:
    """It can be written to, and no other job does; what there is to go on from."""
    if config.folder.exists() and not config.folder.is_dir():
        return fail(f"{config.folder} is a file", "set folder=... to another place")
    with scratch(config.folder) as path:
        path.write_bytes(b"m2")
    with contextlib.suppress(OSError), (config.folder / ".lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return fail(
                f"another job is writing to {config.folder}", "wait for it, end it, or set folder=... to another place"
            )
    steps = checkpoint_steps(config.folder / CHECKPOINTS)
    if not steps:
        return ok(f"{config.folder}: a new run")
    if max(steps) >= config.steps:
        return warn(
            f"{config.folder} holds a checkpoint of step {max(steps)}, and steps is {config.steps}: nothing to train",
            "set steps=... higher, or folder=... to another place",
        )
    return ok(f"{config.folder}: goes on after step {max(steps)} of {config.steps}")


def space(config: RunConfig) -> Verdict:
    """Room for the checkpoints that are kept, and the one being written, beside those that are there."""
    one, count = checkpoint_bytes(numbers(config)), kept_checkpoints(config)
    folder = config.folder / CHECKPOINTS
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    need = max(0, one * count - there)
    free = shutil.disk_usage(nearest(config.folder)).free
    shown = f"{size(free)} free; {count} checkpoint(s) of {size(one)} take {size(need)}" + " more" * (there > 0)
    if need > free:
        return fail(
            shown, "free some, lower checkpoint.keep or raise checkpoint.keep_every, or set folder=... elsewhere"
        )
    if need > 0.8 * free:
        return warn(shown, "little is left for logs, evaluation and others: free some")
    return ok(shown)


def speed(config: RunConfig) -> Verdict:
    """Of writing (until the disk says it has it) and reading back, and what it means for a checkpoint."""
    count = min(SAMPLE, shutil.disk_usage(nearest(config.folder)).free // 4)
    block = os.urandom(1 << 20)  # random: some file systems compress
    with scratch(config.folder) as path:
        started = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(max(1, count >> 20)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = path.stat().st_size / (time.perf_counter() - started)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that reading asks the disk
        started = time.perf_counter()
        with path.open("rb", buffering=0) as source:
            while source.read(1 << 20):
                pass
        read = path.stat().st_size / (time.perf_counter() - started)
    one = checkpoint_bytes(numbers(config))
    shown = f"writes {rate(written)}, reads {rate(read)}; a checkpoint of {size(one)} takes about {one / written:.2g} s"
    if one / written > SLOW_CHECKPOINT_S:
        return warn(shown, "set folder=... to a faster disk, or write checkpoints less often (checkpoint.every)")
    return ok(shown)


def file_clock(folder: Path) -> Verdict:
    """The clock that stamps files there against this host's."""
    with scratch(folder) as path:
        before = time.time()
        path.write_bytes(b"m2")
        after = time.time()
        stamped = path.stat().st_mtime
    # A stamp may be as coarse as a second, and lies between the two looks if the clocks agree.
    apart = max(before - 1 - stamped, stamped - after - 1, 0.0)
    shown = (
        f"files are stamped {apart:.1f} s from this host's clock" if apart else "files are stamped by the same clock"
    )
    return clock_verdict(apart, shown)


def clock_verdict(apart_s: float, shown: str) -> Verdict:
    remedy = "synchronise the clocks (chrony or ntpd): caches, certificates and logs go by them"
    if apart_s > CLOCK_FAIL_S:
        return fail(shown, remedy)
    return warn(shown, remedy) if apart_s > CLOCK_WARN_S else ok(shown)


def data_cache(config: RunConfig) -> Verdict:
    """Room for row groups of object stores."""
    folder = config.data.cache_folder
    assert folder is not None
    with scratch(folder) as path:
        path.write_bytes(b"m2")
    used = sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()) if folder.is_dir() else 0
    free, need = shutil.disk_usage(nearest(folder)).free, config.data.cache_gb * 1e9 - used
    shown = f"{folder}: {size(free)} free, the cache may grow by {size(max(0.0, need))}"
    if need > free:
        return fail(shown, "lower data.cache_gb, free some, or set data.cache_folder to another disk")
    return ok(shown)
