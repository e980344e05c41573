"""A check never raises and never hangs; sizes read well."""

import threading
import time

import pytest

from m2_ds.doctor.check import Check, TimeLimit, ok, size, warn, within


def test_what_a_check_gives() -> None:
    def boom() -> None:
        raise KeyError("a\nb")

    def wrong() -> None:
        raise ValueError("no tokenizer at x; give a folder; or a file")

    def long() -> None:
        raise ValueError("3 wrong fields\n  a; b")

    made = Check("machine", "a", lambda: warn("found", "remedy")).run("host")
    assert (made.status, made.found, made.remedy, made.where) == ("warn", "found", "remedy", "host")
    broken = Check("disk", "b", boom).run()  # type: ignore[arg-type]
    assert broken.status == "fail" and broken.found.startswith("KeyError")
    told = Check("disk", "b", wrong).run()  # type: ignore[arg-type]
    assert (told.status, told.found, told.remedy) == ("fail", "no tokenizer at x", "give a folder; or a file")
    lines = Check("recipe", "c", long).run()  # type: ignore[arg-type]
    assert (lines.found, lines.remedy) == ("3 wrong fields\n  a; b", "")


def test_a_hang_is_a_red_line() -> None:
    never = threading.Event()
    started = time.monotonic()
    result = Check("disk", "speed", lambda: ok(str(never.wait(30))), limit_s=0.2, hang="look at the mount").run()
    assert result.status == "fail" and result.remedy == "look at the mount"
    assert "no answer within 0.2 s" in result.found and time.monotonic() - started < 5
    never.set()


def test_within_gives_values_and_errors_as_they_are() -> None:
    assert within(5, lambda: 3) == 3

    def late() -> None:
        raise TimeoutError("of what was looked at")

    with pytest.raises(TimeoutError, match="of what was looked at"):
        within(5, late)
    with pytest.raises(TimeLimit):
        within(0.05, lambda: time.sleep(1))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (123e6, "123 MB"), (1.5e9, "1.5 GB"), (9.9e15, "9900 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text
