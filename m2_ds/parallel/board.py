"""Notes that ranks leave for each other on the launcher's store: plain connections to the first rank, no collectives.

It works where groups cannot be made, and so can tell why they cannot. A job of one process keeps its notes to itself.
"""

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

_PREFIX = "m2_ds/board"


class Board:
    """Made by `join` on every rank. Values are JSON; a rank may write a name again."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self.rank, self.world_size = store, rank, world_size

    @staticmethod
    def join(limit_s: float) -> "Board":
        """Connect to the store that the launcher's environment describes; the first rank opens it.

        Raises ValueError, with the address, where it cannot be reached within ``limit_s`` seconds.
        """
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return Board(dist.HashStore(), 0, 1)
        host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
        # torchrun's agent holds the store; else the first rank does, and the groups made later share it.
        opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        deadline = time.monotonic() + limit_s
        try:
            if not opens:
                _await_connection(host, port, deadline)
            left = datetime.timedelta(seconds=max(deadline - time.monotonic(), 1.0))
            # The first rank does not wait for the others here: it is to tell which of them do not come.
            store = dist.TCPStore(host, port, world_size, opens, left, wait_for_workers=False, multi_tenant=True)
        except (RuntimeError, OSError) as error:
            does = "open the job's" if opens else "reach the first rank's"
            raise ValueError(
                f"rank {rank} cannot {does} store at {host}:{port} ({str(error).splitlines()[0]}); look at MASTER_ADDR "
                "and MASTER_PORT, at firewalls, and at whether the first host's name resolves here"
            ) from error
        return Board(dist.PrefixStore(_PREFIX, store), rank, world_size)

    def write(self, name: str, value: Any) -> None:
        """Leave a note of this rank's."""
        with _told():
            self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def notes(self, name: str, ranks: Sequence[int]) -> dict[int, Any]:
        """The newest notes of ranks, each of which must have left one; in one message."""
        with _told():
            found = self._store.multi_get([f"{name}/{rank}" for rank in ranks])
        return {rank: json.loads(note) for rank, note in zip(ranks, found)}

    def has(self, name: str, rank: int) -> bool:
        """Whether a rank has left a note. Does not wait."""
        with _told():
            return bool(self._store.check([f"{name}/{rank}"]))

    def count(self, name: str, more: int = 1) -> int:
        """Add to a number that all ranks share; what it is then."""
        with _told():
            return int(self._store.add(name, more))

    def agree(self, name: str, value: Any) -> Any:
        """The value of the rank that was first to propose one: ``value``, if it was this one."""
        with _told():
            return json.loads(self._store.compare_set(name, "", json.dumps(value)))

    def agreed(self, name: str) -> Any:
        """What ranks agreed on; None where none has proposed anything yet. Does not wait."""
        with _told():
            return json.loads(self._store.get(name)) if self._store.check([name]) else None

    def read(self, name: str, rank: int, limit_s: float) -> Any:
        """The note of a rank, waited for. Raises TimeoutError if it is not there within ``limit_s`` seconds."""
        key = f"{name}/{rank}"
        try:
            self._store.wait([key], datetime.timedelta(seconds=max(limit_s, 0.001)))
            return json.loads(self._store.get(key))
        except RuntimeError as error:  # of the store: too late, or its connection is lost
            raise TimeoutError(f"rank {rank} left no note {name!r} within {limit_s:.0f} s") from error


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A store that is gone is a first rank that is gone, in the words of a collective that meets with it."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"the first rank's store is gone: Connection closed by peer ({error})") from error


def _await_connection(host: str, port: int, deadline: float) -> None:
    """Return when something listens there; the store's own waiting fills the terminal with stack traces."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1)):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
