"""From what ranks say about themselves to the one that holds the job up; no communication here, and no threads.

Times are those of a clock that stands still while this process does: a job that is suspended as a whole suspects
nobody.
"""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LOST = 76  # exit code: another rank was lost, or hung; the same command goes on from the newest checkpoint
BROKEN_S = 10.0  # so long a rank may be silent at most when a connection broke, too
LENIENCY = 5.0  # times as long may a rank be silent until its first step is done
_NAMED = 3  # waiting ranks that a verdict describes

Kind = Literal["gone", "silent", "stuck", "cut off", "error"]


@dataclass(frozen=True)
class Place:
    """Where a rank runs. ``machine``: equal where processes see each other; ``started``: tells a pid used again."""

    rank: int
    host: str
    pid: int
    machine: str
    started: str

    @classmethod
    def here(cls, rank: int) -> "Place":
        pid = os.getpid()
        return cls(rank, socket.gethostname(), pid, _machine(), _process(pid)[1])

    def state(self) -> str:
        """The kernel's letter for the process, if it runs on this machine: "T" stopped; "" gone; "?" not known."""
        state, started = _process(self.pid)
        if not self.started:
            return "?"
        return state if started == self.started and state not in ("Z", "X") else ""


@dataclass(frozen=True)
class Verdict:
    """Why the job ends, and the exit code of all ranks. ``ranks``: those to blame; ``by``: the one that found it."""

    kind: Kind
    code: int
    ranks: tuple[int, ...]
    reason: str
    by: int

    @classmethod
    def read(cls, note: Mapping[str, Any]) -> "Verdict":
        return cls(**{**note, "ranks": tuple(note["ranks"])})


class WakingClock:
    """Seconds in which this process ran: a pause between two readings counts as ``longest`` seconds at most."""

    def __init__(self, longest: float) -> None:
        self._longest, self._before, self._now = longest, time.monotonic(), 0.0

    def __call__(self) -> float:
        now = time.monotonic()
        self._now += min(now - self._before, self._longest)
        self._before = now
        return self._now


class Suspects:
    """What one rank knows of the ranks that it listens to. Seconds are of one `WakingClock`, as its caller reads it."""

    def __init__(self, places: Sequence[Place], rank: int, hang_s: float, patience_s: float, silence_s: float) -> None:
        """``hang_s``: without progress in a step (0: any time); ``patience_s``: at the start, in a checkpoint or an
        evaluation; ``silence_s``: without a note (at the start: times `LENIENCY`)."""
        self.places, self.rank = places, rank
        self.hang_s, self.patience_s, self.silence_s = hang_s, max(patience_s, hang_s), silence_s
        self.broken = False  # whether this rank lost a connection
        mine = places[rank].machine
        self._neighbours = [p for p in places if p.machine == mine and p.rank != rank]
        self._notes: dict[int, Mapping[str, Any]] = {}
        self._heard: dict[int, float] = {}  # when the newest note of a rank came
        self._moved: dict[int, float] = {}  # when one with progress came

    def hear(self, notes: Mapping[int, Mapping[str, Any]], now: float) -> None:
        """Notes by rank: `Activity.note` and ``beat`` (it grows), ``left``, ``broken`` (a lost connection)."""
        for rank, note in notes.items():
            before = self._notes.get(rank)
            if before is None or before["beat"] != note["beat"]:
                self._heard[rank] = now
            if before is None or _progress(before) != _progress(note):
                self._moved[rank] = now
            self._notes[rank] = note

    def know(self, notes: Mapping[int, Mapping[str, Any]]) -> None:
        """Notes of ranks that are not listened to, but of which something is to be told."""
        self._notes.update(notes)

    def verdict(self, now: float) -> Verdict | None:
        """The worst that can be said now; None: nothing. ``left`` ranks are beyond suspicion."""
        return self._gone() or self._silent(now) or self._stuck(now)

    def without_first(self) -> Verdict:
        """The first rank's store is gone, and with it whatever the others could say."""
        if (found := self._gone()) is not None and 0 in found.ranks:
            return found
        return Verdict("gone", LOST, (0,), f"{self.tell(0)} is gone, and the job's store with it", self.rank)

    def without_answer(self, seconds: float) -> Verdict:
        """The first rank's store is there and says nothing."""
        state = self.places[0].state() if self.places[0] in self._neighbours else "?"
        why = (
            "its process is stopped (state T)"
            if state in ("T", "t")
            else "its host or network is lost, or it does not run"
        )
        reason = f"{self.tell(0)} has not answered for {seconds:.0f} s, it has the job's store: {why}"
        return Verdict("silent", LOST, (0,), reason, self.rank)

    def tells(self, verdict: Verdict) -> bool:
        """Whether this rank is the one of its machine that tells a verdict which could not be agreed on."""
        if verdict.kind == "error":
            return verdict.by == self.rank
        mine = [p.rank for p in (self.places[self.rank], *self._neighbours) if p.rank not in verdict.ranks]
        return not mine or self.rank == min(mine)

    def neighbours(self, ranks: Sequence[int]) -> list[Place]:
        """Those of ``ranks`` whose processes this one can see, and is not itself."""
        return [p for p in self._neighbours if p.rank in ranks]

    def cut_off(self, error: str) -> Verdict:
        """This rank's connections broke with ``error``, and nobody is found to be the cause."""
        reason = (
            f"{self.tell(self.rank)} lost a connection to other ranks ({error}), and none of them is found to be gone"
        )
        return Verdict("cut off", LOST, (), f"{reason}: look at the network between them", self.rank)

    def _gone(self) -> Verdict | None:
        gone = [p.rank for p in self._neighbours if not self._left(p.rank) and not p.state()]
        if not gone:
            return None
        reason = (
            f"{self._tell_all(gone)} {_is(gone)} gone: a process that ended without a word was killed, as the kernel "
            "does where memory runs out (dmesg tells), or crashed"
        )
        return Verdict("gone", LOST, tuple(gone), reason, self.rank)

    def _silent(self, now: float) -> Verdict | None:
        broken = self.broken or any(note["broken"] for note in self._notes.values())
        limit = min(self.silence_s, BROKEN_S) if broken else self.silence_s
        silent = {rank: now - heard for rank, heard in self._heard.items() if not self._left(rank)}
        silent = {rank: seconds for rank, seconds in silent.items() if seconds > limit * self._leniency(rank)}
        if not silent:
            return None
        ranks = sorted(silent)
        states = {p.state() for p in self._neighbours if p.rank in silent}
        why = "its host or network is lost, or its process does not run"
        if "T" in states or "t" in states:
            why = "its process is stopped (state T)"
        elif states:
            why = "its process exists and does not get to answer"
        reason = f"{self._tell_all(ranks)} {_has(ranks)} given no sign of life for {max(silent.values()):.0f} s: {why}"
        return Verdict("silent", LOST, tuple(ranks), reason, self.rank)

    def _leniency(self, rank: int) -> float:
        """Importing libraries from a slow disk, Python holds its lock for long; a process that is stopped does not."""
        stopped = any(p.state() in ("T", "t") for p in self._neighbours if p.rank == rank)
        return LENIENCY if self._notes[rank]["starting"] and not stopped else 1.0

    def _stuck(self, now: float) -> Verdict | None:
        if not self.hang_s or self.rank != 0:  # who waits for whom can be said by the one that hears all
            return None
        idle = {rank: now - moved for rank, moved in self._moved.items() if not self._left(rank)}
        if not any(seconds > self._limit(rank) for rank, seconds in idle.items()):
            return None
        silent = {rank for rank, heard in self._heard.items() if now - heard > self.silence_s}  # whatever it said last
        resting = [rank for rank, seconds in idle.items() if seconds > self._limit(rank) / 2 or rank in silent]
        behind = self._behind(resting)
        seconds = max(idle[rank] for rank in resting)
        if len(behind) == len(self.places) > 1:
            reason = f"no rank has made progress for {seconds:.0f} s, and all did the same: {self._tell_all(behind)}"
            return Verdict("stuck", LOST, tuple(behind), reason, self.rank)
        reason = f"{self._tell_all(behind)} {_has(behind)} made no progress for {seconds:.0f} s"
        if waiting := [rank for rank in resting if rank not in behind]:
            reason += f", and others wait: {self._tell_all(waiting)}"
        return Verdict("stuck", LOST, tuple(behind), reason, self.rank)

    def _behind(self, ranks: Sequence[int]) -> list[int]:
        """Of ranks that rest: those that the others wait for, as far as their notes tell."""
        step = min(self._notes[rank]["step"] for rank in ranks)
        last = [rank for rank in ranks if self._notes[rank]["step"] == step]
        busy = [rank for rank in last if not self._notes[rank]["inside"]]  # not in a collective that is known here
        last = busy or last
        marks = min(self._notes[rank]["marks"] for rank in last)
        return sorted(rank for rank in last if self._notes[rank]["marks"] == marks)

    def _limit(self, rank: int) -> float:
        return self.patience_s if self._notes[rank]["patient"] else self.hang_s

    def _left(self, rank: int) -> bool:
        return bool(self._notes.get(rank, {}).get("left"))

    def tell(self, rank: int, note: Mapping[str, Any] | None = None) -> str:
        """A rank, and what it last said of itself (or in ``note``)."""
        place, note = self.places[rank], note or self._notes.get(rank)
        where = f"rank {rank} (host {place.host}, process {place.pid}"
        if note is None:
            return f"{where})"
        collective = f"; {'in' if note['inside'] else 'after'} {note['collective']}" if note["collective"] else ""
        return f"{where}; step {note['step'] + 1}: {note['doing']}{collective})"

    def _tell_all(self, ranks: Sequence[int]) -> str:
        told = ", ".join(self.tell(rank) for rank in ranks[:_NAMED])
        more = ranks[_NAMED:]
        return f"{told} and ranks {', '.join(map(str, more))}" if more else told


def _is(ranks: Sequence[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _has(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"


def _progress(note: Mapping[str, Any]) -> tuple[Any, ...]:
    return note["step"], note["marks"], note["doing"]


def _machine() -> str:
    """The same for processes that can look each other up by their numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # no /proc: nobody's neighbour


def _process(pid: int) -> tuple[str, str]:
    """State and start (clock ticks since boot) of a process of this machine; empty where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
