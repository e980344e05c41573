"""A check: something to look at, within a time limit, and what was found."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from m2_ds.schema import Settings

Status = Literal["ok", "warn", "fail", "skipped"]
Section = Literal["machine", "disk", "recipe", "data", "ranks", "network"]
SECTIONS: tuple[Section, ...] = ("machine", "disk", "recipe", "data", "ranks", "network")
T = TypeVar("T")


class Result(Settings):
    """One line of the page. ``where``: the host or rank that looked; empty: the job as a whole."""

    section: Section
    name: str
    status: Status
    found: str
    remedy: str = ""
    where: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What a look gave."""

    status: Status
    found: str
    remedy: str = ""


def ok(found: str) -> Verdict:
    return Verdict("ok", found)


def warn(found: str, remedy: str) -> Verdict:
    return Verdict("warn", found, remedy)


def fail(found: str, remedy: str) -> Verdict:
    return Verdict("fail", found, remedy)


def skipped(reason: str) -> Verdict:
    return Verdict("skipped", reason)


@dataclass(frozen=True)
class Check:
    """``look`` gives a verdict, or raises ValueError where what it found is wrong (a message with its remedy).

    ``hang``: what to do where it does not answer within ``limit_s`` seconds.
    """

    section: Section
    name: str
    look: Callable[[], Verdict]
    limit_s: float = 30.0
    hang: str = "look at the file system or service behind it: it neither answers nor fails"

    def run(self, where: str = "") -> Result:
        """Look; nothing is raised, and nothing takes longer than the limit."""
        started = time.perf_counter()
        try:
            verdict = within(self.limit_s, self.look)
        except TimeLimit:
            verdict = fail(f"no answer within {self.limit_s:g} s", self.hang)
        except ValueError as error:
            verdict = _of_message(str(error))
        except Exception as error:  # a line of the page, whatever went wrong: the other checks go on
            first = (str(error).splitlines() or [""])[0]
            verdict = fail(f"{type(error).__name__}: {first}", "")
        return Result(
            section=self.section,
            name=self.name,
            where=where,
            seconds=round(time.perf_counter() - started, 3),
            **vars(verdict),
        )


class TimeLimit(Exception):
    """A look did not end in time. (Python's TimeoutError also comes from what is looked at.)"""


def within(limit_s: float, work: Callable[[], T]) -> T:
    """The value of ``work()``, or its exception, or `TimeLimit` when it takes longer; its thread is then left behind.

    A call into a dead file system or a broken network cannot be ended from outside, only be left alone.
    """
    box: list[tuple[bool, Any]] = []

    def target() -> None:
        try:
            box.append((True, work()))
        except BaseException as error:
            box.append((False, error))

    thread = threading.Thread(target=target, name="m2-doctor", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not box:
        raise TimeLimit
    done, value = box[0]
    if not done:
        raise value
    return value  # type: ignore[no-any-return]


def run_all(checks: Iterable[Check], where: str = "") -> list[Result]:
    return [check.run(where) for check in checks]


def _of_message(message: str) -> Verdict:
    """Messages of this package are 'what is wrong; what to do'."""
    found, mark, remedy = message.partition("; ")
    if "\n" in found or not mark:
        return fail(message, "")
    return fail(found, remedy)


def size(count: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "bytes" or abs(count) >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def rate(bytes_per_s: float) -> str:
    return f"{size(bytes_per_s)}/s"
