"""Hosts among each other, without collectives: who is there, equal software and data, connections, clocks, one folder.

Every rank leaves notes on the `Board`; the first rank makes the results of them.
"""

import contextlib
import os
import socket
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from m2_ds.doctor.check import Result, Status
from m2_ds.doctor.disk import clock_verdict
from m2_ds.parallel.board import Board

CONNECT_S, SEEN_S, TICKS = 5.0, 10.0, 7
ANSWER_S = 600.0  # the first rank answers one host after another
HARD = ("m2_ds", "commit", "torch", "deepspeed", "megatron-core")  # ranks that differ in these compute different things


@dataclass(frozen=True)
class Hello:
    """What a rank says first. ``address``, ``port``: where the first rank of a host listens; 0 on the others."""

    rank: int
    local_rank: int
    host: str
    pid: int
    address: str
    port: int

    @property
    def name(self) -> str:
        return f"{self.host} ({self.address})" if self.address else self.host


class Listener:
    """Accepts connections on a free port of the address that leads to the first rank, so that others can try."""

    def __init__(self) -> None:
        self.address = own_address()
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        self._socket = socket.create_server((self.address, 0), family=family, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, name="m2-listener", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"m2")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


def own_address() -> str:
    """This host's on the interface that GLOO_ or NCCL_SOCKET_IFNAME names, else on the way to the first rank."""
    there = psutil.net_if_addrs()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for entry in there.get(os.environ.get(variable, "").lstrip("="), []):
            if entry.family == socket.AF_INET:
                return entry.address
    first = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, _, _, _, target = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: it asks for the route
        return str(probe.getsockname()[0])


def connections(own: Hello, others: Sequence[Hello]) -> list[str]:
    """What went wrong in connecting to each of the other hosts."""

    def attempt(other: Hello) -> str:
        try:
            with socket.create_connection((other.address, other.port), timeout=CONNECT_S) as connection:
                connection.settimeout(CONNECT_S)
                answer = connection.recv(2)
            return "" if answer == b"m2" else f"{own.name} reaches something else at {other.name}"
        except OSError as error:
            return f"{own.name} cannot connect to {other.name}, port {other.port}: {error}"

    if not others:
        return []
    with ThreadPoolExecutor(16) as pool:
        return [trouble for trouble in pool.map(attempt, others) if trouble]


def connections_result(troubles: list[str], hosts: int) -> Result:
    if not troubles:
        return line("network", "connections", "ok", f"each of {hosts} hosts connects to every other on a free port")
    return line(
        "network", "connections", "fail", "; ".join(troubles[:8]) + _more(len(troubles) - 8),
        "open all ports between these hosts (firewall, security group, network policy), or name the interface that "
        "joins them in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
    )  # fmt: skip


def tick(board: Board) -> tuple[float, float]:
    """Seconds that the first rank's clock is ahead of this host's, and the uncertainty; `tock` answers there.

    As NTP does it (RFC 5905, section 8): of several questions, the one that was answered fastest.
    """
    found = []
    for number in range(TICKS):
        asked = time.time()
        board.write(f"tick{number}", asked)
        theirs = board.read(f"tock{number}-{board.rank}", 0, ANSWER_S)
        answered = time.time()
        found.append(((answered - asked) / 2, theirs - (asked + answered) / 2))
    uncertainty, offset = min(found)
    return offset, uncertainty


def tock(board: Board, rank: int) -> None:
    """Answer the `tick` of a rank, on the first one. Raises TimeoutError where none comes."""
    for number in range(TICKS):
        board.read(f"tick{number}", rank, 30)
        board.write(f"tock{number}-{rank}", time.time())


def clocks_result(offsets: dict[str, tuple[float, float]]) -> Result:
    """``offsets``: by host, seconds apart from the first one, and how far that may be wrong."""
    host, (offset, uncertainty) = max(offsets.items(), key=lambda item: abs(item[1][0]))
    apart = max(0.0, abs(offset) - uncertainty)
    verdict = clock_verdict(
        apart, f"{host} is furthest from the first host: {abs(offset):.3f} s (+- {uncertainty:.3f} s)"
    )
    return line("ranks", "clocks", verdict.status, verdict.found, verdict.remedy)


def wait_for(path: Path, limit_s: float = SEEN_S) -> bool:
    """Whether a file of another host is seen; network file systems may take seconds."""
    deadline = time.monotonic() + limit_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def shared_result(folder: Path, blind: list[str], hosts: int) -> Result:
    if not blind:
        return line("disk", "one run folder", "ok", f"all {hosts} hosts see what the first one writes near {folder}")
    return line(
        "disk", "one run folder", "fail", f"{', '.join(blind)} do not see what the first host writes near {folder}",
        "mount one file system under the same path on every host",
    )  # fmt: skip


def presence(hellos: dict[int, Hello], world_size: int, limit_s: float) -> Result:
    """Which ranks have come."""
    missing = sorted(set(range(world_size)) - hellos.keys())
    by_host: dict[str, list[int]] = defaultdict(list)
    for hello in hellos.values():
        by_host[hello.host].append(hello.rank)
    there = ", ".join(f"{host} {_ranks(ranks)}" for host, ranks in list(by_host.items())[:8]) + _more(len(by_host) - 8)
    if not missing:
        return line("ranks", "present", "ok", f"{world_size} on {len(by_host)} host(s): {there}")
    found = f"{_ranks(missing)} of {world_size} did not come within {limit_s:.0f} s; there: {there}"
    return line(
        "ranks", "present", "fail", found,
        "look at their output above: a host that is down, another environment, or a first host that they cannot reach "
        "(MASTER_ADDR, MASTER_PORT)",
    )  # fmt: skip


def equal(
    facts: dict[int, dict[str, str | None]], hellos: dict[int, Hello], name: str, hard: Callable[[str], bool]
) -> Result:
    """Whether ranks agree in every fact; those that most have count as right. ``hard``: facts that must not differ."""
    differing: dict[str, str] = {}
    for fact in dict.fromkeys(fact for some in facts.values() for fact in some):
        values = {rank: some.get(fact) for rank, some in facts.items()}
        usual = statistics.mode(values.values())
        odd: dict[str | None, list[int]] = defaultdict(list)
        for rank, value in values.items():
            if value != usual:
                odd[value].append(rank)
        if odd:
            told = [f"{value or 'none'} on {_where(ranks, hellos)}" for value, ranks in odd.items()]
            differing[fact] = f"{fact}: {', '.join(told)}, {usual or 'none'} elsewhere"
    count = len(next(iter(facts.values()), {}))
    if not differing and not count:
        return line("ranks", name, "skipped", "nothing to compare")
    if not differing:
        return line("ranks", name, "ok", f"equal on {len(facts)} rank(s) ({count} compared)")
    status: Status = "fail" if any(map(hard, differing)) else "warn"
    return line(
        "ranks", name, status, "; ".join(differing.values()),
        "give every host the same environment, recipe and files (one file system or one image for all)",
    )  # fmt: skip


def line(section: Any, name: str, status: Status, found: str, remedy: str = "") -> Result:
    """A result of the job as a whole."""
    return Result(section=section, name=name, status=status, found=found, remedy=remedy)


def first_of_hosts(hellos: dict[int, Hello]) -> list[Hello]:
    """One rank of every host, in rank order. A host is what has a first local rank: names may repeat."""
    return [hello for _, hello in sorted(hellos.items()) if hello.local_rank == 0]


def _where(ranks: list[int], hellos: dict[int, Hello]) -> str:
    hosts = list(dict.fromkeys(hellos[rank].host for rank in ranks if rank in hellos))
    return f"{_ranks(ranks)} ({', '.join(hosts[:4])}{_more(len(hosts) - 4)})"


def _ranks(ranks: Sequence[int]) -> str:
    """ranks 0 to 7, 9."""
    parts = [f"{first} to {last}" if last > first else f"{first}" for first, last in _stretches(sorted(ranks))]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(parts)}"


def _stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = last = None
    for number in numbers:
        if first is None or last is None:
            first = last = number
        elif number == last + 1:
            last = number
        else:
            yield first, last
            first = last = number
    if first is not None and last is not None:
        yield first, last


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
