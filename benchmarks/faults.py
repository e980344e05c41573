#!/usr/bin/env python
"""Faults at random in a small run, which is started again until it is done: does it end as if nothing had been?

    python benchmarks/faults.py                      # 200 faults and more, half an hour
    python benchmarks/faults.py --faults 10 --out /tmp/faults.json

An episode is a run of two ranks over gloo (24 steps of 16 pairs, a checkpoint every 3, every ninth picture broken) that
meets with faults in up to eight of its starts. `m2_ds.restarts.supervise`, which is `m2 train --restarts`, starts it
again; where it leaves that to the user (a full disk, SIGTERM), this program does. In the end the last checkpoint
(weights, optimizer, position in the data) and the log's numbers are compared with those of a run that was left alone,
bit for bit. Ranks are forked from this process, which has everything imported; otherwise they are `m2_ds.train`.

    kill                  SIGKILL of a rank, in a step or while the job starts
    kill in a checkpoint  SIGKILL where a rank opens, renames or removes a file of a checkpoint that is being written
    stop                  SIGSTOP of a rank
    hang                  a rank waits for ever: in a step, for data, holding Python's lock, before a collective
    terminate             SIGTERM to one rank
    full disk             the run folder's file system (tmpfs) has no room for the next checkpoint until the job ended
    truncated file        of the newest checkpoint, between a kill and the next start
    flipped bit           likewise
    network               the link between two network namespaces, a rank in each, goes down; up again after
    clock                 the clock jumps by up to a year (libfaketime) while the job runs; nothing should happen

Needs root for the tmpfs and the namespaces, and `pip install libfaketime` for the clock; kinds that cannot be had are
left out, and told.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")

from benchmarks import tables  # noqa: E402
from benchmarks.faults_rank import Fault, damage, make_data, rank_process, write_recipe  # noqa: E402
from benchmarks.faults_report import differs, table  # noqa: E402
from m2_ds import restarts, train  # noqa: E402, F401
from m2_ds.convert.run_folder import checkpoint_steps, newest_good  # noqa: E402
from m2_ds.engine import preflight, resume, setup, trainer, watchdog  # noqa: E402, F401
from m2_ds.evaluation import run as evaluation_run  # noqa: E402, F401

RANKS, STEPS, EVERY, AN_EPISODE = 2, 24, 3, 8
SHARES = {
    "kill": 24, "kill in a checkpoint": 18, "stop": 6, "hang": 6, "terminate": 7, "full disk": 6, "truncated file": 10,
    "flipped bit": 10, "network": 5, "clock": 8,
}  # fmt: skip
BETWEEN = ("truncated file", "flipped bit")  # these strike when the job is not there
START_S, END_S, LAUNCHER_S = 4.0, 600.0, 90.0
NETWORK, JUMP_S = ("m2fa", "m2fb"), 3600 * 24 * 365


@dataclass
class Episode:
    """One run folder and what befell it. ``planned``: faults that are still to come, one a start."""

    number: int
    place: Path
    planned: list[Fault]
    chance: random.Random
    found: list[dict[str, Any]] = field(default_factory=list)
    by_hand: int = 0
    starts: int = 0
    orphans: int = 0

    @property
    def folder(self) -> Path:
        return self.place / "run"

    @property
    def recipe(self) -> Path:
        return self.place / "run.yaml"

    def done(self) -> int:
        """Steps in the log."""
        with contextlib.suppress(OSError):
            return (self.folder / "log.jsonl").read_bytes().count(b"\n")
        return 0

    def goes_on_from(self) -> int:
        newest = newest_good(self.folder / "checkpoints")
        return 0 if newest is None else int(newest.name.split("-")[1])

    def start(self, environment: dict[str, str]) -> tuple[int, bool]:
        """What a launcher does, with the next fault; `restarts.Start`."""
        self.starts += 1
        while self.planned and self.planned[0].kind in BETWEEN:
            self._damage(self.planned.pop(0))
        begun, fault = self.goes_on_from(), self.planned[0] if self.planned else None
        if fault is not None and begun + (fault.steps or 0) >= STEPS - 1:
            self.planned, fault = [], None  # too near to the end: it would strike nothing
        struck = self.place / "struck"
        struck.unlink(missing_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        networked = fault is not None and fault.kind == "network"
        address = "10.77.0.1" if networked else "127.0.0.1"
        common = {
            **environment, "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": address,
            "MASTER_PORT": str(port), "M2_FAULTS_STRUCK": str(struck),
        }  # fmt: skip
        processes = {}
        for rank in range(RANKS):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if networked:
                own |= {"M2_FAULTS_NODE": NETWORK[rank], "GLOO_SOCKET_IFNAME": "m2f"}
            sys.stdout.flush()
            if (process := os.fork()) == 0:
                rank_process(rank, self.recipe, own, self.place / "output.txt", fault)
            processes[process] = rank
        striker = Striker(self, fault, {rank: process for process, rank in processes.items()}, struck, begun)
        code = self._wait(processes, striker)
        if fault is not None and fault.kind != "clock" and struck.exists():
            self.planned.pop(0)
            ended = Path(environment[restarts.ENDED_FILE])
            self._record(fault, float(struck.read_text()), code, ended, begun)
            striker.undo()
        return code, False

    def _wait(self, processes: dict[int, int], striker: "Striker") -> int:
        """Until all ranks ended; the first code that is not 0, of the kind that deepspeed makes of it. As launchers do,
        it ends others where one has failed and they stay."""
        code, deadline, limit = 0, None, time.monotonic() + END_S
        while processes:
            process, status = os.waitpid(-1, os.WNOHANG)
            now = time.monotonic()
            if process:
                processes.pop(process)
                found = os.waitstatus_to_exitcode(status)
                code = code or (found if found >= 0 else 256 + found)
                deadline = now + LAUNCHER_S if code and deadline is None else deadline
                continue
            striker.look(now)
            if now > limit or (deadline is not None and now > deadline):
                self.orphans += len(processes)
                for left in processes:
                    os.kill(left, signal.SIGKILL)
                deadline, limit = None, now + END_S
            time.sleep(0.02)
        return code

    def _record(self, fault: Fault, at: float, code: int, ended: Path, begun: int) -> None:
        end = restarts.how_it_ended(code, json.loads(ended.read_text()) if ended.exists() else None, False, False)
        steps, behind = self.done(), self.goes_on_from()
        self.found.append({
            "episode": self.number, "kind": fault.kind, "rank": fault.rank, "began": begun, "reached": steps,
            "goes_on_from": behind, "lost": max(0, steps - behind), "code": end.code,
            "seconds": round(time.monotonic() - at, 2), "limit": fault.limit_s,
            "reason": end.reason[:300],
        })  # fmt: skip

    def _damage(self, fault: Fault) -> None:
        checkpoints = self.folder / "checkpoints"
        steps = sorted(checkpoint_steps(checkpoints))
        if len(steps) < 2 or self.goes_on_from() != steps[-1]:
            return  # the only whole one: without it the run is refused, and rightly so
        file = damage(checkpoints / f"step-{steps[-1]:08}", fault.kind, self.chance)
        self.found.append({
            "episode": self.number, "kind": fault.kind, "file": file, "reached": steps[-1],
            "goes_on_from": self.goes_on_from(), "lost": steps[-1] - self.goes_on_from(),
        })  # fmt: skip


class Striker:
    """Strikes from outside where the fault is of that kind, when it is time."""

    def __init__(self, episode: Episode, fault: Fault | None, ranks: dict[int, int], struck: Path, begun: int) -> None:
        self.episode, self.fault, self.ranks, self.note = episode, fault, ranks, struck
        self.due: float | None = None
        self.begins, self.begun = begun, False
        outside = fault is not None and fault.kind not in ("hang", "kill in a checkpoint")
        self.waiting = outside
        self.wanted = None if fault is None or fault.steps is None else begun + fault.steps
        if outside and fault is not None and fault.steps is None:
            self.due = time.monotonic() + fault.delay

    def look(self, now: float) -> None:
        if not self.waiting or self.fault is None:
            return
        if self.due is None and self.wanted is not None:
            done = self.episode.done()
            self.begun = self.begun or done <= self.begins  # a start drops the lines of steps that it makes again
            if self.begun and done >= self.wanted:
                self.due = now + self.fault.delay
        if self.due is not None and now >= self.due:
            self.waiting = False
            self.note.write_text(str(time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                self._strike(self.fault)
            if self.fault.kind == "clock":
                self._next_jump(self.fault)

    def _strike(self, fault: Fault) -> None:
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM}.get(fault.kind)
        if number is not None:
            os.kill(self.ranks[fault.rank], number)
        elif fault.kind == "full disk":
            free = shutil.disk_usage(self.episode.place).free
            room = fault.number * 16384  # less than a checkpoint
            with contextlib.suppress(OSError), (self.episode.place / "filler").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - room))
        elif fault.kind == "network":
            link("down")
        elif fault.kind == "clock":
            seconds = self.episode.chance.randint(-JUMP_S, JUMP_S)
            Path(os.environ["FAKETIME_TIMESTAMP_FILE"]).write_text(f"{seconds:+d}\n")

    def _next_jump(self, fault: Fault) -> None:
        """Several to a start: none is to end it."""
        episode, done = self.episode, self.episode.done()
        episode.found.append({"episode": episode.number, "kind": fault.kind, "reached": done, "lost": 0})
        episode.planned.pop(0)
        if episode.planned:
            self.fault, self.due = episode.planned[0], None
            self.waiting, self.wanted = True, done + (self.fault.steps or 0)

    def undo(self) -> None:
        (self.episode.place / "filler").unlink(missing_ok=True)
        if self.fault is not None and self.fault.kind == "network":
            link("up")


def link(state: str) -> None:
    subprocess.run(["ip", "-n", NETWORK[1], "link", "set", "m2f", state], check=True)


@contextlib.contextmanager
def network() -> Iterator[bool]:
    """Two namespaces with a cable between them; False where that is not allowed."""
    commands = [
        *(f"ip netns add {name}" for name in NETWORK),
        f"ip link add m2f netns {NETWORK[0]} type veth peer name m2f netns {NETWORK[1]}",
        *(f"ip -n {name} addr add 10.77.0.{n}/24 dev m2f" for n, name in enumerate(NETWORK, 1)),
        *(f"ip -n {name} link set {device} up" for name in NETWORK for device in ("m2f", "lo")),
    ]
    try:
        yield all(subprocess.run(c.split(), capture_output=True).returncode == 0 for c in commands)
    finally:
        for name in NETWORK:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "m2faults", str(place)], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(place)])


def plan(faults: int, seed: int, kinds: list[str]) -> list[list[Fault]]:
    """Faults of episodes, each kind's share of all. The clock's are among themselves: they need a library loaded."""
    chance, shares = random.Random(seed), {kind: SHARES[kind] for kind in kinds}
    counts = {kind: max(1, round(faults * share / sum(shares.values()))) for kind, share in shares.items()}
    drawn = [_draw(kind, chance) for kind, count in counts.items() for _ in range(count) if kind != "clock"]
    chance.shuffle(drawn)
    jumps = [_draw("clock", chance) for _ in range(counts.get("clock", 0))]
    return [some[i : i + AN_EPISODE] for some in (drawn, jumps) for i in range(0, len(some), AN_EPISODE)]


def _draw(kind: str, chance: random.Random) -> Fault:
    steps: int | None = chance.randint(1, 4)
    if kind == "clock":
        steps = chance.randint(1, 3)
    elif kind in ("kill", "stop", "terminate") and chance.random() < 0.2:
        steps = None
    delay = chance.uniform(0.0, START_S if steps is None else 0.3)
    return Fault(kind, chance.randrange(RANKS), steps, delay, chance.randint(1, 20))


def run_episode(
    number: int, faults: list[Fault], place: Path, data: tuple[Path, Path], alone: Path | None, seed: int
) -> dict[str, Any]:
    """To its end, by as many starts as it takes. ``alone``: the run folder to compare with."""
    place.mkdir(exist_ok=True)
    episode = Episode(number, place, list(faults), random.Random(seed * 1000 + number))
    write_recipe(episode.recipe, episode.folder, *data, STEPS, EVERY)
    begun = time.monotonic()
    while (code := restarts.supervise(episode.start, episode.folder, STEPS, restarts=50)) != 0:
        episode.by_hand += 1
        (place / "filler").unlink(missing_ok=True)
        if episode.by_hand > 30:
            break
    difference = f"it ended with {code}" if code else "" if alone is None else differs(alone, episode.folder, STEPS)
    lines = (episode.folder / restarts.LOG).read_text().splitlines() if (episode.folder / restarts.LOG).exists() else []
    return {
        "episode": number, "faults": episode.found, "starts": episode.starts, "by_hand": episode.by_hand,
        "restarts": len(lines), "killed_by_launcher": episode.orphans, "seconds": round(time.monotonic() - begun, 1),
        "difference": difference,
    }  # fmt: skip


def faketime() -> Path | None:
    """The library that the package of that name brings."""
    package = importlib.util.find_spec("libfaketime")
    places = [] if package is None else package.submodule_search_locations or []
    return next((path for place in places for path in Path(place).rglob("libfaketime.so.1")), None)


def clock_can_jump() -> bool:
    """Some releases of libfaketime refuse the absolute monotonic times by which Python 3.11 sleeps."""
    if (library := faketime()) is None:
        return False
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME": "+9"}
    sleep = [sys.executable, "-c", "import time; time.sleep(0.01)"]
    return subprocess.run(sleep, env=environment, capture_output=True).returncode == 0


def run_clock(arguments: list[str], place: Path) -> list[dict[str, Any]]:
    """Episodes of a clock that jumps, in a process whose clock can."""
    stamp, out = place / "clock", place / "clock.json"
    stamp.write_text("+0\n")
    more = {
        "LD_PRELOAD": str(faketime()), "FAKETIME_TIMESTAMP_FILE": str(stamp), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_RESET": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, *arguments, "--clock", str(out)]
    subprocess.run(command, env={**os.environ, **more}, check=True)
    return list(json.loads(out.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=210)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no new run is begun after so long")
    parser.add_argument("--kinds", nargs="*", choices=list(SHARES), help="these only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/faults.json")
    parser.add_argument("--more", action="store_true", help="add to what --out holds, of another seed or other kinds")
    parser.add_argument("--clock", type=Path, help=argparse.SUPPRESS)  # this process's clock can jump; where to write
    options = parser.parse_args()
    begun, kinds, left_out = time.monotonic(), options.kinds or list(SHARES), []
    with (
        tempfile.TemporaryDirectory(prefix="m2-faults-") as folder,
        small_disk(Path(folder) / "disk") as disk,
        network() as networked,
    ):
        place = Path(folder)
        for kind, there, why in (
            ("full disk", disk, "a tmpfs may not be mounted"),
            ("network", networked, "network namespaces may not be made"),
            ("clock", clock_can_jump(), "no libfaketime, or one under which Python cannot sleep"),
        ):
            if kind in kinds and not there:
                kinds.remove(kind)
                left_out.append(f"{kind} ({why})")
        episodes = plan(options.faults, options.seed, kinds)
        data = make_data(place)
        alone = run_episode(-1, [], place / "alone", data, None, options.seed)
        assert not alone["difference"], alone
        found = []
        for number, faults in enumerate(episodes):
            clock = faults[0].kind == "clock"
            if clock != (options.clock is not None) or time.monotonic() - begun > options.minutes * 60:
                continue
            where = place / "disk" / str(number) if disk else place / str(number)
            found.append(run_episode(number, faults, where, data, place / "alone/run", options.seed))
            print(json.dumps({**found[-1], "faults": [f["kind"] for f in found[-1]["faults"]]}), flush=True)
            if found[-1]["difference"]:
                shutil.copytree(where, options.out.with_suffix("") / str(number), dirs_exist_ok=True)
            shutil.rmtree(where)
        if options.clock is not None:
            options.clock.write_text(json.dumps(found))
            return
        left = options.minutes - (time.monotonic() - begun) / 60
        if "clock" in kinds and left > 0:
            asked = {"faults": options.faults, "seed": options.seed, "minutes": left}
            found += run_clock([f"--{name}={value}" for name, value in asked.items()] + ["--kinds", *kinds], place)
        before = json.loads(options.out.read_text()) if options.more else {"seeds": [], "minutes": 0, "episodes": []}
        content = {
            "machine": tables.machine("torch", "deepspeed"), "seeds": sorted({*before["seeds"], options.seed}),
            "left_out": left_out, "kinds": list(SHARES), "steps": STEPS, "every": EVERY, "ranks": RANKS,
            "minutes": round(before["minutes"] + (time.monotonic() - begun) / 60, 1),
            "episodes": before["episodes"] + found,
        }  # fmt: skip
        tables.publish(options.out, content, table(content))


if __name__ == "__main__":
    main()
