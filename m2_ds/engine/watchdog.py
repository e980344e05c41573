"""A rank that is dead or hangs ends the job soon, with its name and what it did, instead of holding all others up.

A thread on every rank leaves a note on the launcher's store about what its rank does (no collective, no waiting for the
device), about once a second. The first rank reads the notes of all, the others that of the first, and every rank looks
after the processes of its own machine. Whoever finds something proposes it as the job's verdict: the first proposal
holds, its rank tells it, and all ranks end with its exit code. A rank that ends by an error of its own proposes that,
so that the others end with the same code.

A collective that waits for a rank that is gone cannot be interrupted from within: the thread ends its process.
"""

import contextlib
import faulthandler
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, TextIO

import psutil
import torch.distributed as dist

from m2_ds.engine.interrupt import EXIT_CODE, ToldAtStart
from m2_ds.engine.suspects import LENIENCY, LOST, Place, Suspects, Verdict, WakingClock
from m2_ds.files import write_json
from m2_ds.parallel.board import Board
from m2_ds.parallel.collectives import all_gather_objects, barrier
from m2_ds.parallel.mesh import Mesh

WRONG_INPUT, BROKEN = 2, 1  # exit codes: told what to change; something that nobody thought of
ENDED_FILE = "M2_DS_ENDED"  # in the environment: a file that is told how the job ended, for who started it
STACKS = "stacks"  # folder of the run folder

_JOIN_S = 60.0
_FIRST_S = 1.0  # by which other ranks let the first one tell what all have found
_FAREWELL_S = 5.0  # for which the first rank, which has the store, waits for others to have read the verdict
_PAUSE_S = 2.0  # by which a thread may come late: a longer pause is one of the process
_CONNECTION = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|Socket (Timeout|closed)|Application timeout|"
    r"NCCL (error|communicator)|nccl(Remote|System|Internal)Error"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Seconds: without progress in a step (0: for ever), where it may take its time, and without a sign of life."""

    hang_s: float = 600.0
    patience_s: float = 1800.0
    silence_s: float = 60.0

    @property
    def interval_s(self) -> float:
        """Between two notes of a rank."""
        shortest = min(self.silence_s, self.hang_s or self.silence_s)
        return min(1.0, shortest / 4)


class Watchdog:
    """One on every rank, from the moment that ranks can talk until `leave`. It ends the process where it has to."""

    def __init__(self, mesh: Mesh, folder: Path, limits: Limits) -> None:
        """Every rank calls it. ``folder``: of the run, to which Python's stacks are written on a hang."""
        self.mesh, self.limits, self.folder = mesh, limits, folder / STACKS
        self.activity = mesh.traffic.activity
        self._board = Board.join(_JOIN_S)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives its ranks
        self._beats, self._found, self._read = (f"watchdog {attempt}: {x}" for x in ("beat", "verdict", "read"))
        self._beat = self._exchanges = 0
        self._left, self._broken, self._detail = False, "", ""
        self._broken_at: float | None = None
        self._proposal: Verdict | None = None
        self._unread: list[int] = []
        self._wake, self._stop, self._once = threading.Event(), threading.Event(), threading.Lock()
        self._files, self._ending = threading.Lock(), False
        self._stacks: TextIO | None = None
        self.activity.on_first_step = self._settle
        self._leave_note()
        places = all_gather_objects(Place.here(mesh.rank), mesh.world)  # and by then all have left one
        self._suspects = Suspects(places, mesh.rank, limits.hang_s, limits.patience_s, limits.silence_s)
        # Under a launcher its end is that of the job; a process of its own may outlive the shell that started it.
        self._parent = os.getppid() if mesh.world_size > 1 else None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._report, self._guard)]
        for thread in self._threads:
            thread.start()

    def leave(self, code: int, reason: str) -> None:
        """The run is over on this rank, without an error; every rank calls it and waits for the others."""
        self._left = True
        try:
            self._leave_note()
            barrier(self.mesh.world)
        except RuntimeError as error:  # all is done and written: what breaks now is nobody's loss
            log.warning("ranks did not part in order: %s", error)
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(_FAREWELL_S)
        self._disarm()
        if self.mesh.is_first:
            _write_ended(code, reason, self.mesh.rank, self.activity.step)

    def end(self, error: Exception) -> NoReturn:
        """This rank cannot go on. All ranks end: where a connection broke by what is found to be its cause, else by the
        code of ``error``."""
        text = str(error) or type(error).__name__
        if isinstance(error, ToldAtStart):
            self._propose(EXIT_CODE, text)
        elif isinstance(error, (ValueError, FloatingPointError)):
            self._propose(WRONG_INPUT, text)
        elif isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _CONNECTION.search(text)):
            self._suspects.broken, self._broken = True, text.splitlines()[0]
        else:
            self._detail = traceback.format_exc()
            self._propose(BROKEN, f"{type(error).__name__}: {text}")
        self._wake.set()
        time.sleep(self.limits.silence_s * 2 + _JOIN_S)  # a thread ends the process before
        os._exit(LOST)

    def _propose(self, code: int, reason: str) -> None:
        if not self.mesh.is_first:
            time.sleep(_FIRST_S)
        self._proposal = Verdict("error", code, (self.mesh.rank,), reason, self.mesh.rank)

    def _settle(self) -> None:
        """From now on silence is borne for a shorter time, by others and by this rank's own timer."""
        self._arm()
        self._wake.set()

    def _leave_note(self) -> None:
        self._beat += 1
        more = {"beat": self._beat, "left": self._left, "broken": self._broken}
        self._board.write(self._beats, {**self.activity.note(), **more})

    def _report(self) -> None:
        """Say what this rank does, hear what others do, and look for a verdict, again and again."""
        clock = WakingClock(self.limits.interval_s + _PAUSE_S)
        while not self._stop.is_set():
            try:
                verdict = self._exchange(clock())
            except RuntimeError:  # the store's
                if not self._left:
                    self._carry_out(self._proposal or self._suspects.without_first(), agreed=False)
                return
            if verdict is not None:
                self._carry_out(verdict, agreed=True)
            self._wake.wait(self.limits.interval_s)
            self._wake.clear()

    def _exchange(self, now: float) -> Verdict | None:
        board, suspects, everyone = self._board, self._suspects, range(self.mesh.world_size)
        self._leave_note()
        if (found := board.agreed(self._found)) is None:
            suspects.hear(board.notes(self._beats, everyone if self.mesh.is_first else [0]), now)
            proposal = self._proposal
            if proposal is None and suspects.verdict(now) is not None:
                suspects.know(board.notes(self._beats, everyone))  # what it did, or that it left in order
                proposal = suspects.verdict(now)
            if proposal is None and self._broken:
                self._broken_at = now if self._broken_at is None else self._broken_at
                if now - self._broken_at > self.limits.silence_s:
                    proposal = suspects.cut_off(self._broken)
            if proposal is not None:
                found = board.agree(self._found, asdict(proposal))
        self._exchanges += 1
        return None if found is None else Verdict.read(found)

    def _guard(self) -> None:
        """What the other thread cannot do while it waits for the store: that is gone, or this process is not run."""
        clock = WakingClock(self.limits.interval_s + _PAUSE_S)
        exchanges, since = -1, 0.0
        while not self._stop.wait(self.limits.interval_s):
            now = clock()
            if self._exchanges != exchanges:
                exchanges, since = self._exchanges, now
                self._arm()
            elif now - since > self.limits.silence_s and not self._left:
                verdict = self._proposal or self._suspects.without_answer(now - since)
                self._carry_out(verdict, agreed=False)
            if self._parent is not None and os.getppid() != self._parent:
                log.warning("rank %d: its launcher is gone; it ends behind a checkpoint", self.mesh.rank)
                self._parent = None
                os.kill(os.getpid(), signal.SIGTERM)

    def _arm(self) -> None:
        """Have the stacks written by a thread of C's, if Python's threads do not get to run until then: before others
        notice the silence. Not before the run has a folder: wrong input leaves none behind."""
        with self._files, contextlib.suppress(OSError):
            if self._stacks is None and not self._ending and self.folder.parent.is_dir():
                self.folder.mkdir(exist_ok=True)
                self._stacks = self._stack_file(self.mesh.rank).open("w")
            if self._stacks is not None:
                if self._stacks.seek(0, os.SEEK_END):  # of a silence that has ended
                    self._stacks.truncate(0)
                    self._stacks.seek(0)
                borne = LENIENCY if self.activity.note()["starting"] else 1.0
                faulthandler.dump_traceback_later(self.limits.silence_s * borne * 0.75, file=self._stacks)

    def _disarm(self) -> None:
        """For good."""
        with self._files:
            self._ending = True
            faulthandler.cancel_dump_traceback_later()
            if self._stacks is not None:
                self._stacks.close()
                _remove_empty(self._stack_file(self.mesh.rank))
                self._stacks = None

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05}-{self._suspects.places[rank].pid}.txt"

    def _carry_out(self, verdict: Verdict, agreed: bool) -> NoReturn:
        """End this process as the verdict says. ``agreed``: the others know of it; else every machine tells it once."""
        if not self._once.acquire(blocking=False):
            threading.Event().wait()  # for the other thread to end the process
        try:
            self._take_leave(verdict, agreed)
        except Exception:  # a terminal that is gone, a disk that is full: the process ends all the same
            log.exception("while it ended")
        _leave_process(verdict.code)

    def _take_leave(self, verdict: Verdict, agreed: bool) -> None:
        """Tell the verdict, see that others have it, and end those of this machine that cannot read it."""
        mine = verdict.by == self.mesh.rank if agreed else self._suspects.tells(verdict)
        hung = verdict.kind in ("stuck", "silent", "cut off")
        _in_time(partial(self._put_down, verdict, hung, mine))
        if mine:
            _in_time(partial(self._tell, verdict, hung))
        deaf = set(verdict.ranks) if verdict.kind in ("gone", "silent") else set()
        if agreed:
            _in_time(partial(self._part, deaf))
        for place in self._suspects.neighbours([*deaf, *self._unread]):  # a launcher asks them in vain
            if place.state():
                with contextlib.suppress(OSError):
                    os.kill(place.pid, signal.SIGKILL)

    def _put_down(self, verdict: Verdict, hung: bool, mine: bool) -> None:
        """In files: this rank's stacks on a hang, and why the job ended."""
        self._disarm()
        if hung:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._stack_file(self.mesh.rank).open("a") as file:
                print(f"{self._suspects.tell(self.mesh.rank, self.activity.note())}\n", file=file, flush=True)
                faulthandler.dump_traceback(file)
        elif verdict.kind == "gone":
            for rank in verdict.ranks:
                _remove_empty(self._stack_file(rank))
        if mine:
            _write_ended(verdict.code, verdict.reason, self.mesh.rank, self.activity.step)

    def _tell(self, verdict: Verdict, hung: bool) -> None:
        text = self._detail or verdict.reason
        of_another = f", rank {self.mesh.rank}" if verdict.kind == "error" and not self.mesh.is_first else ""
        if verdict.kind != "error":
            text += (
                f". All ranks end with exit code {verdict.code}; the same command goes on from the newest checkpoint"
            )
        if hung:
            files = [self._stack_file(rank) for rank in verdict.ranks[:3]]
            if verdict.kind == "silent":
                files = [path for path in files if _holds_something(path)]
            named = f": {', '.join(map(str, files))}" if files else ""
            text += f". Python's stacks are in {self.folder}{named}"
        print(f"m2_ds.train{of_another}: {text}", file=sys.stderr, flush=True)

    def _part(self, deaf: set[int]) -> None:
        """Say that this rank has read the verdict, and wait for those of its machine: who has not read it in the end
        (``_unread``) holds Python's lock. The first rank, which has the store, waits until all have that can."""
        everyone = range(self.mesh.world_size)
        neighbours = [place for place in self._suspects.neighbours(everyone) if place.rank not in deaf]
        expected = len(everyone) - len(deaf) if self.mesh.is_first else 0
        deadline = time.monotonic() + (_FAREWELL_S if self.mesh.is_first else _FAREWELL_S - 1)
        try:
            self._board.write(self._read, True)
            self._board.count(self._read)
            while time.monotonic() < deadline:
                self._unread = [p.rank for p in neighbours if p.state() and not self._board.has(self._read, p.rank)]
                if not self._unread and self._board.count(self._read, 0) >= expected:
                    return
                time.sleep(0.05)
        except RuntimeError:  # the first rank has left, when all had read it
            self._unread = []


def _remove_empty(path: Path) -> None:
    """The file where nothing is in it, and its folder likewise."""
    with contextlib.suppress(OSError):
        if not _holds_something(path):
            path.unlink()
        path.parent.rmdir()


def _holds_something(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _in_time(work: Callable[[], None]) -> None:
    """Do it if it can be done, and do not wait for ever: what hangs may be the disk or the pipe that it writes to."""

    def quietly() -> None:
        with contextlib.suppress(OSError, ValueError):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(_FAREWELL_S + 1)


def _write_ended(code: int, reason: str, rank: int, step: int) -> None:
    """For who started the job, if it asked (`ENDED_FILE`)."""
    if path := os.environ.get(ENDED_FILE):
        with contextlib.suppress(OSError):
            write_json(Path(path), {"code": code, "reason": reason, "rank": rank, "step": step})


def _leave_process(code: int) -> NoReturn:
    """At once: Python's own way out waits for threads and collectives. Loader processes go first."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            if "resource_tracker" not in " ".join(child.cmdline()):  # it ends by itself, and tidies up before
                child.kill()
    for stream in (sys.stdout, sys.stderr):
        _in_time(stream.flush)
    os._exit(code)
