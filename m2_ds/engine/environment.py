"""What a run runs on (versions, machine, code state), and that it has its folder to itself."""

import contextlib
import errno
import fcntl
import logging
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import m2_ds
from m2_ds.parallel.collectives import broadcast_object
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "pyarrow", "sentencepiece", "pillow", "numpy")


def describe(mesh: Mesh) -> dict[str, Any]:
    """JSON-able facts; what cannot be found is None."""
    found = software()
    return {
        "m2_ds": found["m2_ds"],
        "commit": found["commit"],
        "modified_files": (_git("status", "--porcelain") or "").splitlines(),
        "command": sys.argv,
        "python": found["python"],
        "packages": found["packages"],
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu",
        "world_size": mesh.world_size,
        "backend": mesh.backend,
    }


def software() -> dict[str, Any]:
    """Versions of this package, its checkout, Python, and the packages that numbers depend on."""
    return {
        "m2_ds": m2_ds.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Of the checkout that the package lies in; None for an installed package or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


@contextlib.contextmanager
def claim(folder: Path, mesh: Mesh) -> Iterator[None]:
    """Make the run folder and hold its lock, so that a second job does not write into it.

    The lock goes with the process that holds it, however that ends. Every rank raises ValueError where it is taken.
    """
    error, lock = None, None
    if mesh.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("a")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = f"another job is writing to {folder}; wait for it, end it, or set folder=... to another one"
        except OSError as problem:
            if lock is not None and problem.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                log.warning("%s is on a file system without locks: do not start a second job on it", folder)
            else:
                error = f"folder: cannot write to {folder}: {problem}"
    try:
        if error := broadcast_object(error, mesh.world):
            raise ValueError(error)
        yield
    finally:
        if lock is not None:
            lock.close()
