"""Run a function on real gloo ranks: one process each, a time limit, nothing left behind."""

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

SECONDS = 120.0


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
    """``function(mesh, *arguments)`` on every rank; the results in rank order (picklable).

    The first exception of any rank is raised here with its traceback; ranks still running after ``seconds`` are killed.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, results, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        return _collect(processes, results, time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(processes: list[Any], results: Any, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(processes):
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(set(range(len(processes))) - found.keys())} did not finish in time")
        try:
            rank, value, error = results.get(timeout=1.0)
        except queue.Empty:
            dead = [i for i, p in enumerate(processes) if p.exitcode not in (None, 0) and i not in found]
            if dead:
                raise RuntimeError(f"ranks {dead} died with {[processes[i].exitcode for i in dead]}") from None
            continue
        if error is not None:
            raise RuntimeError(f"rank {rank} failed:\n{error}")
        found[rank] = pickle.loads(value)
    return [found[rank] for rank in range(len(processes))]


def _rank(rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        from m2_ds.engine.setup import quiet
        from m2_ds.parallel.mesh import Mesh

        quiet()
        mesh = Mesh.start(timeout_minutes=2)
        # Bytes, because a queue sends tensors as open files, which are gone with the process that sent them.
        value = pickle.dumps(function(mesh, *arguments))
        mesh.stop()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
