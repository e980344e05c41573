"""A disk that is full, read-only or gone while a run writes to it: what is lost, what is kept, what ends it."""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from m2_ds.convert.run_folder import checkpoint_steps, newest_good
from m2_ds.engine import tolerance
from m2_ds.engine.step import ContrastiveStep
from m2_ds.engine.tolerance import Board, Forgiving
from m2_ds.files import Lines
from m2_ds.parallel.mesh import Mesh
from m2_ds.train import run
from tests.engine.jobs import changed, compare_checkpoints, config_of, log_lines


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(*arguments: str) -> None:
    made = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mount is not permitted here: {made.stderr.strip()}")


def fill(folder: Path) -> None:
    """Until nothing fits."""
    with contextlib.suppress(OSError), open(folder / "filling", "ab", buffering=0) as file:
        for size in (65536, 512, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass


@contextlib.contextmanager
def before_step(actions: dict[int, Callable[[], object]]) -> Iterator[None]:
    original = ContrastiveStep.__call__

    def call(self: ContrastiveStep, batches: Any, step: int = 0) -> Any:
        actions.get(step + 1, lambda: None)()
        return original(self, batches, step)

    ContrastiveStep.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        ContrastiveStep.__call__ = original  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_costs_log_lines_and_a_checkpoint_and_room_brings_them_back(
    solo: Mesh,
    recipe: dict[str, Any],
    small_disk: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    asynchronous: bool,
) -> None:
    block = {"every": 4, "keep": 1, "asynchronous": asynchronous}
    tree = changed(recipe, {"steps": 16, "checkpoint": block})
    room = {6: lambda: fill(small_disk), 14: (small_disk / "filling").unlink}
    with before_step(room):
        run(config_of(changed(tree, {"folder": str(small_disk / "run")})), solo)
    for step in (8, 12):
        assert f"step-{step:08} could not be written" in caplog.text
    assert "No space left" in caplog.text and "lost so far" in caplog.text
    assert re.search(r"is lost: .*\d x log line", caplog.text)
    steps = [line["step"] for line in log_lines(small_disk / "run")]  # a page of the file may still have had room
    assert {1, 2, 3, 4, 5, 14, 15, 16} <= set(steps) and len(steps) < 16
    assert checkpoint_steps(small_disk / "run/checkpoints") == [16]
    run(config_of(changed(tree, {"folder": str(tmp_path / "plain")})), solo)
    compare_checkpoints(*(folder / "checkpoints/step-00000016" for folder in (small_disk / "run", tmp_path / "plain")))


def test_a_disk_that_stays_full_ends_the_run_with_the_last_good_one(
    solo: Mesh, recipe: dict[str, Any], small_disk: Path
) -> None:
    tree = changed(recipe, {"folder": str(small_disk / "run"), "checkpoint": {"every": 1, "keep": 1}})
    words = "step-00000005 could not be written.*free space"
    with before_step({3: lambda: fill(small_disk)}), pytest.raises(ValueError, match=words):
        run(config_of(tree), solo)
    found = newest_good(small_disk / "run/checkpoints")
    assert found is not None and found.name == "step-00000002"
    (small_disk / "filling").unlink()
    run(config_of(tree), solo)
    assert checkpoint_steps(small_disk / "run/checkpoints") == [8]


def test_a_folder_that_is_read_only_for_a_while(
    solo: Mesh, recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run/checkpoints"

    def lock() -> None:
        mount("--bind", str(folder), str(folder))
        mount("-o", "remount,bind,ro", str(folder))

    def unlock() -> None:
        subprocess.run(["umount", "-l", str(folder)], check=True)

    tree = changed(recipe, {"folder": str(tmp_path / "run"), "checkpoint": {"every": 2, "keep": 1}})
    with before_step({3: lock, 6: unlock}):
        run(config_of(tree), solo)
    assert "step-00000004 could not be written" in caplog.text and "Read-only file system" in caplog.text
    assert checkpoint_steps(folder) == [8] and len(log_lines(tmp_path / "run")) == 8


def test_a_folder_that_is_gone_for_a_while(
    solo: Mesh, recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, kept = tmp_path / "run/checkpoints", tmp_path / "kept"

    def lose() -> None:
        shutil.move(folder, kept)
        folder.write_text("")  # nothing can be made below it

    def bring_back() -> None:
        folder.unlink()
        shutil.move(kept, folder)

    tree = changed(recipe, {"folder": str(tmp_path / "run"), "checkpoint": {"every": 2, "keep": 1}})
    with before_step({3: lose, 6: bring_back}):
        run(config_of(tree), solo)
    assert "step-00000004 could not be written" in caplog.text
    assert checkpoint_steps(folder) == [8]


def test_warnings_come_once_a_minute_and_all_losses_are_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(tolerance.time, "monotonic", lambda: now)
    forgiving = Forgiving()
    for second in (0, 1, 59, 61, 62):
        now = float(second)
        with forgiving("log line"):
            raise OSError("No space left on device")
    assert caplog.text.count("a log line could not be written") == 2 and "lost so far: 4 x log line" in caplog.text
    forgiving.end()
    assert "is lost: 5 x log line" in caplog.text
    with pytest.raises(ValueError), forgiving("log line"):
        raise ValueError("something else")


@pytest.mark.parametrize(("cut", "left"), [(True, ["one", "third"]), (False, ["one", "sec", "third"])])
def test_lines_begin_anew_behind_one_that_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool, left: list[str]
) -> None:
    lines = Lines(tmp_path / "log")
    lines.append("one")

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 3

        def write(self, data: bytes) -> int:
            if not self.left:
                raise OSError(28, "No space left on device")
            done, self.left = self.file.write(data[: self.left]), 0
            return int(done)

        def close(self) -> None:
            self.file.close()

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    lines._file = Full(lines._file)  # type: ignore[assignment]
    if not cut:
        monkeypatch.setattr("os.truncate", refuse)
    with pytest.raises(OSError, match="No space"):
        lines.append("second")
    lines.append("third")
    lines.close()
    assert (tmp_path / "log").read_text().splitlines() == left


def test_curves_go_on_in_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(tmp_path / "tensorboard", 1)
    board.add(1, {"loss": 1.0})
    assert board._writer is not None

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(board._writer, "add_scalar", full)
        with pytest.raises(OSError, match="No space"):
            board.add(2, {"loss": 2.0})
    with pytest.raises(OSError, match="less than a minute ago"):
        board.add(3, {"loss": 3.0})
    monkeypatch.setattr(tolerance, "_PAUSE_S", 0.0)
    board.add(4, {"loss": 4.0})
    board.close()
