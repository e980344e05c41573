"""Traces of a few steps by torch's profiler, at steps that the recipe names or that a file asks for while a job runs.

Every rank that is asked starts before the same step. Outside the traced steps nothing is recorded, and nothing is asked
but whether the file is there, at log lines.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from m2_ds.config import ProfileConfig, RunConfig
from m2_ds.engine.clock import MARK, Clock
from m2_ds.engine.interrupt import Interrupted
from m2_ds.files import publish, write_atomically
from m2_ds.parallel.collectives import broadcast_object
from m2_ds.parallel.mesh import Mesh

REQUEST = "profile.request"  # in the run folder: "STEPS RANKS", e.g. "5 0,3" or "5 all"; may be empty
ROWS = 15
BETWEEN = "between phases"

log = logging.getLogger(__name__)


class Profiler:
    """A context around the training loop. Every rank has one, and tells it each step that is done."""

    def __init__(self, config: RunConfig, mesh: Mesh, clock: Clock) -> None:
        self.folder, self.every, self.last = config.folder, config.log.every, config.steps
        self.mesh, self.clock, self.planned = mesh, clock, config.log.profile
        if self.planned is not None:
            check_ranks(self.planned, mesh.world_size)
        self._profile: profile | None = None
        self._asked: ProfileConfig | None = None
        self._first = self._until = self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._profile is not None:
            if kind is None or kind is Interrupted:
                self._write(min(self._seen + 1, self._until))  # an interruption ends the step behind the last one seen
            else:
                self._stop()

    def between(self, done: int) -> None:
        """After step number ``done`` (from 1), before the next one; collective at log lines."""
        self._seen = done
        if self._asked is not None and done >= self._until:
            self._write(done)
        if done >= self.last:
            return
        if self.planned is not None and done + 1 == self.planned.start:
            self._start(self.planned, done)
        elif done and done % self.every == 0 and self._asked is None:
            asked = self._request() if self.mesh.is_first else None
            if (asked := broadcast_object(asked, self.mesh.world)) is not None:
                self._start(asked, done)

    def _request(self) -> ProfileConfig | None:
        """What the file asks for; it is removed. A wrong one is told, and the job goes on."""
        path = self.folder / REQUEST
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: %s", path, error)
            return None
        try:
            asked = parse_request(text)
            check_ranks(asked, self.mesh.world_size)
        except ValueError as error:
            log.warning("%s: %s", REQUEST, error)
            return None
        return asked

    def _start(self, asked: ProfileConfig, done: int) -> None:
        if self._asked is not None:
            return
        self._asked, self._first, self._until = asked, done + 1, min(done + asked.steps, self.last)
        if asked.takes(self.mesh.rank):
            activities = [ProfilerActivity.CPU]
            if self.mesh.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
            self.clock.marked = True

    def _stop(self) -> profile | None:
        found, self._profile, self._asked = self._profile, None, None
        if found is not None:
            if self.mesh.device.type == "cuda":
                torch.cuda.synchronize(self.mesh.device)
            self.clock.marked = False
            found.stop()
        return found

    def _write(self, done: int) -> None:
        """The trace and its summary, under ``profile/`` of the run folder, by the first step and the rank."""
        steps, ranks = done - self._first + 1, self._asked.ranks if self._asked else "all"
        found = self._stop()
        if found is None or steps < 1:
            return
        folder = self.folder / "profile" / f"step-{self._first:08}"
        rank = self.mesh.rank
        path, aside = folder / f"rank-{rank:04}.json.gz", folder / f".rank-{rank:04}.json.gz"
        text = summary(found.events() or (), steps, self.mesh.device.type == "cuda")
        title = f"steps {self._first} to {done}, rank {rank}: {path}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(aside))
            publish(aside, path)
            write_atomically(path.with_name(f"rank-{rank:04}.txt"), f"{title}\n\n{text}\n".encode())
        except (OSError, RuntimeError) as error:  # a run can do without
            log.warning("the trace of rank %d could not be written: %s. Training goes on", rank, error)
        if rank == (0 if ranks == "all" else min(ranks)):
            log.info("traced %s\n\n%s\n", title, text)


def check_ranks(asked: ProfileConfig, world_size: int) -> None:
    if asked.ranks != "all" and (missing := [rank for rank in asked.ranks if rank >= world_size]):
        raise ValueError(f"log.profile.ranks names {missing}; this job has ranks 0 to {world_size - 1}")


def parse_request(text: str) -> ProfileConfig:
    """'', '5', '5 all', '5 0,3' -> what to trace. ``start`` has no meaning."""
    words = text.split()
    if (
        len(words) > 2
        or (words and not words[0].isdecimal())
        or (words[1:] and not re.fullmatch(r"all|[\d,]+", words[1]))
    ):
        raise ValueError(f"{text.strip()[:60]!r} is not STEPS RANKS, such as '5', '5 all' or '5 0,3'")
    fields: dict[str, Any] = {"start": 1}
    if words:
        fields["steps"] = int(words[0])
    if words[1:]:
        fields["ranks"] = "all" if words[1] == "all" else [int(rank) for rank in words[1].split(",") if rank]
    return ProfileConfig.model_validate(fields)


@dataclass
class Row:
    """Sums over the traced steps, microseconds. ``phases``: of its own time."""

    calls: int
    cpu: float
    device: float
    phases: dict[str, float]


def summary(events: Sequence[Any], steps: int, on_gpu: bool) -> str:
    """Two tables: phases, and the operators that took the most time of their own (of the GPU where there is one)."""
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name.removeprefix(MARK))
        for event in events
        if event.name.startswith(MARK) and event.device_type == torch.autograd.DeviceType.CPU
    )
    operators: dict[str, Row] = {}
    phases = {name: Row(0, 0.0, 0.0, {"": 0.0}) for _, _, name in spans}
    for start, end, name in spans:
        phases[name].calls += 1
        phases[name].phases[""] += end - start
    place = 0
    for event in sorted(events, key=lambda one: one.time_range.start):
        if event.device_type != torch.autograd.DeviceType.CPU or event.name.startswith(MARK):
            continue
        at = event.time_range.start
        while place < len(spans) and spans[place][1] < at:
            place += 1
        phase = spans[place][2] if place < len(spans) and spans[place][0] <= at else BETWEEN
        cpu, device = event.self_cpu_time_total, event.self_device_time_total
        for row in (
            operators.setdefault(event.name, Row(0, 0.0, 0.0, {})),
            phases.setdefault(phase, Row(0, 0.0, 0.0, {"": 0.0})),
        ):
            row.cpu += cpu
            row.device += device
        operators[event.name].calls += 1
        operators[event.name].phases[phase] = operators[event.name].phases.get(phase, 0.0) + (device if on_gpu else cpu)
    return _tables(operators, phases, steps, on_gpu)


def _tables(operators: dict[str, Row], phases: dict[str, Row], steps: int, on_gpu: bool) -> str:
    def ms(value: float) -> str:
        return f"{value / 1000 / steps:.2f}"

    def own(row: Row) -> float:
        return row.device if on_gpu else row.cpu

    whole = sum(map(own, operators.values())) or 1.0
    lines = [["phase", "ms a step", "own CPU ms", "own GPU ms"]]
    lines += [
        [name, ms(row.phases[""]) if row.calls else "", ms(row.cpu), ms(row.device)] for name, row in phases.items()
    ]
    first = _aligned(lines if on_gpu else [line[:3] for line in lines])
    lines = [["operator", "calls a step", "own CPU ms", "own GPU ms", "share", "mostly in"]]
    for name, row in sorted(operators.items(), key=lambda item: -own(item[1]))[:ROWS]:
        most = max(row.phases, key=lambda phase: row.phases[phase])
        where = f"{most} {100 * row.phases[most] / (own(row) or 1.0):.0f}%"
        cells = [
            name[:60],
            f"{row.calls / steps:.1f}",
            ms(row.cpu),
            ms(row.device),
            f"{100 * own(row) / whole:.1f}%",
            where,
        ]
        lines.append(cells)
    return first + "\n\n" + _aligned(lines if on_gpu else [line[:3] + line[4:] for line in lines])


def _aligned(lines: list[list[str]]) -> str:
    """The first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    told = ([cell.rjust(width) for cell, width in zip(line, widths)] for line in lines)
    return "\n".join("  ".join([line[0].ljust(widths[0]), *cells[1:]]) for line, cells in zip(lines, told))
