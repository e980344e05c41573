"""OUT appears as a whole, is gone on with after a kill, and nothing that was there before is lost."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_ds.convert.canonical import read_weights, weight_files
from m2_ds.convert.output import HashedFile, Output
from tests.convert.checkpoints import as_layout, assert_same_bits, converted, left_in, random_state, write

SHARDS = {"shard_size": "100kB"}
KILLED_AT = """
import os, signal, sys
from pathlib import Path
from m2_ds.convert.command import convert
from m2_ds.convert.output import HashedFile
count, chunks = int(sys.argv[3]), 0
original = HashedFile.write
def write(self, data):
    global chunks
    chunks += 1
    if chunks == count:
        original(self, memoryview(data)[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, data)
HashedFile.write = write
convert(Path(sys.argv[1]), Path(sys.argv[2]), shard_size="100kB")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in", as_layout(random_state(), "lightning"))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the large files that are written from here on."""
    names: list[str] = []
    original = HashedFile.__init__

    def init(self: HashedFile, path: Path, *rest: Any) -> None:
        names.append(path.name)
        original(self, path, *rest)

    monkeypatch.setattr(HashedFile, "__init__", init)
    return names


def killed(source: Path, out: Path, chunk: int) -> None:
    command = [sys.executable, "-c", KILLED_AT, str(source), str(out), str(chunk)]
    assert subprocess.run(command, timeout=100, capture_output=True).returncode == -signal.SIGKILL
    assert not out.exists()


def test_goes_on_after_a_kill(tmp_path: Path, source: Path, written: list[str]) -> None:
    whole = converted(source, tmp_path / "whole", **SHARDS)
    names = [path.name for path in weight_files(whole)]
    assert written == names and len(names) == 6
    killed(source, tmp_path / "out", 60)
    kept = json.loads((tmp_path / ".out.part.json").read_text())["files"]
    assert 1 < len(kept) < len(names)
    cut = tmp_path / ".out.part" / names[1]
    os.truncate(cut, cut.stat().st_size - 1)  # by whatever; it is not taken for a finished one
    del kept[cut.name]
    written.clear()
    out = converted(source, tmp_path / "out", **SHARDS)
    assert written == [name for name in names if name not in kept]
    assert left_in(out) == left_in(whole) and left_in(tmp_path) == ["in", "out", "whole"]
    for name in left_in(whole):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_other_settings_or_another_source_start_afresh(tmp_path: Path, source: Path, written: list[str]) -> None:
    whole = converted(source, tmp_path / "whole", **SHARDS)
    count = len(weight_files(whole))
    for change in ({"dtype": "bfloat16"}, {"image_size": 64}, {"shard_size": "90kB"}, "source"):
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Output, "publish", interrupt)
            converted(source, tmp_path / "out", **SHARDS)
        assert (tmp_path / ".out.part").exists()
        written.clear()
        if change == "source":
            stat = source.stat()
            os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
            out = converted(source, tmp_path / "out", **SHARDS)
        else:
            out = converted(source, tmp_path / "out", **{**SHARDS, **change})  # type: ignore[dict-item]
        assert len(written) == len(weight_files(out)) >= (count + 1) // 2
        assert left_in(tmp_path) == ["in", "out", "whole"]
        shutil.rmtree(out)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_damaged_journal_starts_afresh(tmp_path: Path, source: Path) -> None:
    for content in (b"", b"[]", b'{"fingerprint": 1}', b"\xff"):
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Output, "publish", interrupt)
            converted(source, tmp_path / "out", **SHARDS)
        (tmp_path / ".out.part.json").write_bytes(content)
        assert_same_bits(read_weights(converted(source, tmp_path / "out", **SHARDS)), random_state())
        shutil.rmtree(tmp_path / "out")


def test_a_finished_one_is_kept_unless_said_otherwise(tmp_path: Path, source: Path) -> None:
    out = converted(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"out exists: give another folder, or --overwrite"):
        converted(source, out, dtype="float16")
    assert_same_bits(read_weights(out), random_state())
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "publish", interrupt)
        converted(source, out, dtype="float16", overwrite=True)
    assert_same_bits(read_weights(out), random_state())
    converted(source, out, dtype="float16", overwrite=True)
    assert {x.dtype for x in read_weights(out).values()} == {torch.float16}
    assert left_in(tmp_path) == ["in", "out"]


def test_what_was_there_comes_back_after_a_kill_between_two_renames(tmp_path: Path, source: Path) -> None:
    out = converted(source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2_ds.convert.output.publish", interrupt)
        converted(source, out, dtype="float16", overwrite=True)
    assert not out.exists() and (tmp_path / ".out.removed").exists()
    with pytest.raises(ValueError, match="does not reach"):
        state = random_state()
        state["norm.bias"][0] = 1e6
        converted(write(tmp_path / "other", state), out, dtype="float16", overwrite=True)
    assert_same_bits(read_weights(out), random_state())
    assert left_in(tmp_path) == ["in", "other", "out"]


def test_other_peoples_files_are_not_removed(tmp_path: Path, source: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("x")
    with pytest.raises(ValueError, match="was not written by a conversion"):
        converted(source, tmp_path / "thesis", overwrite=True)
    out = converted(source, tmp_path / "out")
    (out / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no conversion wrote \(notes\.txt\)"):
        converted(source, out, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        converted(source, tmp_path / "file", overwrite=True)
    for inside in (source.parent, tmp_path):
        with pytest.raises(ValueError, match="holds the source"):
            converted(source, inside, overwrite=True)
    assert (out / "notes.txt").exists() and (tmp_path / "thesis/chapter.tex").exists()
    (tmp_path / "empty").mkdir()
    converted(source, tmp_path / "empty")


def test_two_at_once(tmp_path: Path, source: Path) -> None:
    (tmp_path / ".out.part").mkdir()
    held = os.open(tmp_path / ".out.part", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match="is being written by another process"):
            converted(source, tmp_path / "out")
    finally:
        os.close(held)
    converted(source, tmp_path / "out")


def test_a_full_disk(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, written: list[str]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 5, 5))
        with pytest.raises(ValueError, match=r"476\.7 kB are needed, 5 bytes are free"):
            converted(source, tmp_path / "out", **SHARDS)
    assert left_in(tmp_path) == ["in"]
    original, chunks = HashedFile.write, 0

    def fails(self: HashedFile, data: Any) -> int:
        nonlocal chunks
        chunks += 1
        if chunks == 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", fails)
        with pytest.raises(ValueError, match=r"cannot be written: No space left on device.*same command then goes on"):
            converted(source, tmp_path / "out", **SHARDS)
    assert not (tmp_path / "out").exists()
    before = len(written)
    out = converted(source, tmp_path / "out", **SHARDS)
    assert len(written) - before < len(weight_files(out))
    assert_same_bits(read_weights(out), random_state())


def test_a_source_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", as_layout(random_state(), "lightning"))
    original = Output.__enter__

    def enter(self: Output) -> Output:
        os.truncate(source, 200_000)
        return original(self)

    monkeypatch.setattr(Output, "__enter__", enter)
    with pytest.raises(ValueError, match=r"m2\.ckpt ends early"):
        converted(source, tmp_path / "out", **SHARDS)
    assert left_in(tmp_path) == ["in"]
