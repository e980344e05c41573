"""The cache on disk: bounded, shared by processes, never stale, and nobody's rotten bytes."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from m2_ds.data.cache import DiskCache
from m2_ds.data.reader import open_dataset
from tests.support.cache_users import fetch_forever, read_all
from tests.support.pairs import make_dataset, record
from tests.support.web import Store


def stored(folder: Path) -> dict[str, int]:
    """Pieces with their bytes."""
    return {path.name: path.stat().st_size for path in folder.glob("[0-9a-f][0-9a-f]/*")}


def piece(name: str, size: int = 1000) -> bytes:
    return (name.encode() * size)[:size]


def test_a_piece_is_fetched_once_and_kept_whole(tmp_path: Path) -> None:
    cache, calls = DiskCache(tmp_path, 10_000), []

    def fetch() -> bytes:
        calls.append(1)
        return b"x" * 100

    assert cache.get("ab-1") is None
    assert [cache.get_or_fetch("ab-1", fetch) for _ in range(3)] == [b"x" * 100] * 3
    assert len(calls) == 1 and DiskCache(tmp_path, 10_000).get("ab-1") == b"x" * 100
    assert stored(tmp_path) == {"ab-1": 116}


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "other"])
def test_rot_is_found_and_the_piece_fetched_again(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DiskCache(tmp_path, 10_000)
    cache.get_or_fetch("ab-1", lambda: piece("a"))
    cache.get_or_fetch("ab-2", lambda: piece("b"))
    path = tmp_path / "ab" / "ab-1"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    new = {"flip": content, "cut": content[:700], "empty": b"", "other": (tmp_path / "ab" / "ab-2").read_bytes()}
    path.write_bytes(new[change])
    assert cache.get("ab-1") is None and not path.exists()
    assert f"{path} is damaged" in caplog.text
    assert cache.get_or_fetch("ab-1", lambda: piece("a")) == piece("a")
    assert cache.get("ab-1") == piece("a")


def test_the_bound_holds_and_what_was_used_longest_ago_leaves(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    for number in range(40):
        name = f"{number:02x}-0"
        cache.get_or_fetch(name, lambda name=name: piece(name))  # type: ignore[misc]
        assert cache.get("00-0") == piece("00-0")  # in use all the time
        os.utime(tmp_path / "00" / "00-0", (2e9, 2e9))
        os.utime(tmp_path / name[:2] / name, (1e9 + number, 1e9 + number)) if number else None
        assert sum(stored(tmp_path).values()) <= 10_000
    left = sorted(stored(tmp_path))
    assert left[0] == "00-0" and left[1:] == [f"{number:02x}-0" for number in range(40 - len(left) + 1, 40)]
    assert len(left) >= 8
    assert cache.get_or_fetch("ff-1", lambda: bytes(20_000)) == bytes(20_000)  # too large to keep
    assert "ff-1" not in stored(tmp_path)


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 5_000)
    cache.get_or_fetch("ab-1", lambda: piece("a"))
    old, new = tmp_path / "ab" / ".old.part", tmp_path / "ab" / ".new.part"
    old.write_bytes(bytes(3000))
    os.utime(old, (1e9, 1e9))
    new.write_bytes(bytes(100))
    (tmp_path / ".size").write_text("garbage")
    for number in range(5):
        cache.get_or_fetch(f"cd-{number}", lambda: bytes(900))
    assert not old.exists() and new.exists()
    assert sum(stored(tmp_path).values()) <= 5_000


def test_a_full_disk_is_told_and_reading_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    cache = DiskCache(tmp_path, 10_000)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert cache.get_or_fetch("ab-1", lambda: b"1") == b"1"
    assert cache.get_or_fetch("ab-2", lambda: b"2") == b"2"
    assert caplog.text.count("No space left on device") == 1


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_folder: .*file cannot be written"):
        DiskCache(tmp_path / "file", 100)


def test_a_fetch_that_fails_leaves_no_lock(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise ConnectionError

    cache = DiskCache(tmp_path, 10_000)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            cache.get_or_fetch("ab-1", fail)
    assert cache.get_or_fetch("ab-1", lambda: b"1") == b"1"


def test_one_fetches_while_others_wait_or_go_on(tmp_path: Path) -> None:
    cache, begun, go = DiskCache(tmp_path, 10_000), threading.Event(), threading.Event()

    def slow() -> bytes:
        begun.set()
        go.wait(5)
        return b"slow"

    first = threading.Thread(target=cache.get_or_fetch, args=("ab-1", slow))
    first.start()
    begun.wait(5)
    assert cache.get_or_fetch("ab-1", lambda: b"other", wait=False) is None
    found: list[bytes | None] = []
    second = threading.Thread(target=lambda: found.append(cache.get_or_fetch("ab-1", lambda: b"other")))
    second.start()
    go.set()
    first.join(5), second.join(5)
    assert found == [b"slow"]


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_processes_share_a_cache(tmp_path: Path, share: float) -> None:
    """With room for all, each piece is asked for once by all of them together; with less, all is right and bounded."""
    total = make_dataset(tmp_path / "set", 120).index("train").total_bytes
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with Store(tmp_path / "set") as store:
        bound = int(2 * total * share)
        processes = [
            context.Process(target=read_all, args=(store.url, tmp_path / "cache", bound, seed, results), daemon=True)
            for seed in range(3)
        ]
        for process in processes:
            process.start()
        assert [results.get(timeout=60) for _ in processes] == [True] * 3
        for process in processes:
            process.join(20)
            assert process.exitcode == 0
    ranges = [(asked.file, asked.start) for asked in store.asked if "train-0" in asked.file]
    assert share < 1 or len(ranges) == len(set(ranges))
    assert sum(stored(tmp_path / "cache").values()) <= bound
    assert len(ranges) > 20


def test_a_process_that_is_killed_while_it_fetches_holds_nobody_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=fetch_forever, args=(tmp_path, ready), daemon=True)
    process.start()
    assert ready.wait(30) and process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    started = time.monotonic()
    assert DiskCache(tmp_path, 10_000).get_or_fetch("ab-1", lambda: b"mine") == b"mine"
    assert time.monotonic() - started < 5


def test_a_replaced_data_set_is_not_read_from_pieces_of_the_old_one(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 10**7)
    make_dataset(tmp_path / "set", 30)
    with Store(tmp_path / "set") as store:
        assert open_dataset(store.url).split("train", disk=cache).read([5]) == [record(5)]
        (tmp_path / "set" / "manifest.json").unlink()
        make_dataset(tmp_path / "set", 30, name="other")
        assert open_dataset(store.url).split("train", disk=cache).read([5]) == [record(5, "other")]


def test_a_warm_cache_needs_no_store(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", 60)
    with Store(tmp_path / "set") as store:
        cache = DiskCache(tmp_path / "cache", 10**7)
        open_dataset(store.url).split("train", disk=cache).read(range(60))
        store.fail = lambda asked: 503 if "train-0" in asked.file else None
        again = open_dataset(store.url).split("train", disk=DiskCache(tmp_path / "cache", 10**7))
        assert again.read(range(60)) == [record(number) for number in range(60)]
