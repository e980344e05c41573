"""Tasks over many items: in this process, on the cores of this machine, or on a cluster, with the same code.

Ray runs them: ray core, not Ray Data. Tasks hand over names of files and counts, never pictures, so a pair costs the
engine nothing. A task gives its files their names when they are whole, and may
therefore be run again, by Ray after a machine was lost or by the next start of the same command.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from m2_ds.prepare.config import WorkConfig
from m2_ds.prepare.work import Job

Task = Callable[[Job, Any], dict[str, Any]]


class Engine(Protocol):
    """`map` yields what a task returns for each item, as they finish, with the CPU seconds under "cpu".

    A task's ValueError is raised as it is.
    """

    def map(self, task: Task, job: Job, items: Sequence[Any], *, gpus: int = 0) -> Iterator[dict[str, Any]]: ...

    def close(self) -> None: ...


class InProcess:
    """One item after the other, here."""

    def map(self, task: Task, job: Job, items: Sequence[Any], *, gpus: int = 0) -> Iterator[dict[str, Any]]:
        for item in items:
            start = time.process_time()
            result = task(job, item)
            yield {**result, "cpu": time.process_time() - start}

    def close(self) -> None:
        pass


class OnRay:
    """Ray's workers: `workers` processes of this machine, or all that a cluster has."""

    def __init__(self, workers: int | None, address: str | None) -> None:
        import ray

        self.ray = ray
        if ray.is_initialized():
            raise ValueError("Ray is in use by this process; prepare in a process of its own, or with work.workers=0")
        common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if address is None:
            cores = workers or len(os.sched_getaffinity(0))
            # The object store holds counts only; its default would be a third of the memory.
            ray.init(num_cpus=cores, include_dashboard=False, object_store_memory=96 << 20, **common)
            self.most = cores
        else:
            try:
                ray.init(address=address, **common)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ValueError(f"work.address {address!r}: no Ray cluster answers there ({error})") from None
            found = int(ray.cluster_resources().get("CPU", 1))
            self.most = min(workers or found, found)

    def map(self, task: Task, job: Job, items: Sequence[Any], *, gpus: int = 0) -> Iterator[dict[str, Any]]:
        ray = self.ray
        if gpus and not ray.cluster_resources().get("GPU"):
            raise ValueError("similarity.device is cuda, and Ray sees no GPU here; set it to cpu")
        run = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_run)
        shared = ray.put(job)
        waiting = iter(items)
        running: set[Any] = set()
        try:
            while True:
                # A few more than run, so that none waits for this process; not all, so that their list stays short.
                while len(running) < self.most + 2 and (item := next(waiting, _NONE)) is not _NONE:
                    running.add(run.remote(task, shared, item))
                if not running:
                    return
                ready, rest = ray.wait(list(running), num_returns=1)
                running = set(rest)
                for handle in ready:
                    error, result = ray.get(handle)
                    if error is not None:
                        raise ValueError(error)
                    yield result
        finally:
            for handle in running:
                ray.cancel(handle, force=True)

    def close(self) -> None:
        self.ray.shutdown()


_NONE = object()


def _run(task: Task, job: Job, item: Any) -> tuple[str | None, dict[str, Any]]:
    """A wrong input comes back as its message: Ray would wrap it in the worker's traceback."""
    start = time.process_time()
    try:
        result = task(job, item)
        return None, {**result, "cpu": time.process_time() - start}
    except ValueError as error:
        return str(error) or type(error).__name__, {}


def start(config: WorkConfig) -> Engine:
    """The engine that a configuration asks for."""
    if config.workers == 0 and config.address is None:
        return InProcess()
    return OnRay(config.workers, config.address)
