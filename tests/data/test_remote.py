"""Data sets behind URLs: the same records, by ranges, through faults, ahead of need; and what is told when it ends."""

import asyncio
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.asyn import AsyncFileSystem

from m2_ds.data import store as stores
from m2_ds.data.config import DataConfig
from m2_ds.data.reader import Split, open_dataset
from m2_ds.data.stream import build_loader
from tests.support.pairs import ByteTokenizer, make_dataset, record
from tests.support.web import Asked, Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "set"
    make_dataset(folder, 120)
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_WAIT_S", 0.002)


def batches(path: str | Path, count: int, **changes: Any) -> list[tuple[list[str], bytes]]:
    base = {"sources": [{"path": path}], "image_size": 16, "mixing_window": 16, "shuffle_groups": 3}
    loader = build_loader(
        DataConfig.model_validate(base | changes), ByteTokenizer(), global_batch=8, micro_batch=8, seed=1
    )
    return [(batch.keys, batch.images.numpy().tobytes()) for batch in islice(loader, count)]


@pytest.mark.parametrize("read_ahead", [0, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_a_url_gives_the_batches_of_the_folder(folder: Path, tmp_path: Path, read_ahead: int, cached: bool) -> None:
    wanted = batches(folder, 40)
    changes: dict[str, Any] = {"read_ahead": read_ahead, "row_group_cache_mb": 1}
    changes["cache_folder"] = tmp_path if cached else None
    with Store(folder) as store:
        assert batches(store.url, 40, **changes) == wanted


def test_loader_processes_read_urls(folder: Path, tmp_path: Path) -> None:
    assert batches(f"file://{folder}", 12, workers=2, cache_folder=tmp_path) == batches(folder, 12)


def test_memory_and_trailing_slashes(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/remote-set", recursive=True)
    split = open_dataset("memory://remote-set/").split("train")
    assert split.read([3, 100]) == [record(3), record(100)]
    assert split.folder == "memory://remote-set"
    assert open_dataset(Path("memory://remote-set")).name == "pair"  # Path() folds the slashes


def test_one_row_group_is_two_requests_and_no_more_bytes_than_it_has(folder: Path) -> None:
    with Store(folder) as store:
        split = open_dataset(store.url).split("train")
        store.asked.clear()
        assert split.read([0, 3]) == [record(0), record(3)]
        assert len(store.asked) == 2 and all(asked.start is not None for asked in store.asked)
        footer, group = store.asked
        assert footer.stop == split.index.size(0) and group.stop <= footer.start  # type: ignore[operator]
        before = store.bytes_of("train-00000")
        split.read([1])
        assert store.bytes_of("train-00000") == before
        store.asked.clear()
        keys = [row["key"] for row in split.iter(columns=["key"])]
        assert keys == [f"pair/{number}" for number in range(120)]
        assert store.bytes_of("train-") < split.index.total_bytes / 2


def _times(count: int, fault: int | str) -> Callable[[Asked], int | str | None]:
    """Every range fails this many times, and then comes."""
    seen: dict[tuple[Any, ...], int] = {}

    def fail(asked: Asked) -> int | str | None:
        key = (asked.file, asked.start)
        seen[key] = seen.get(key, 0) + 1
        return fault if seen[key] <= count else None

    return fail


@pytest.mark.parametrize("fault", [503, 429, "cut"])
def test_what_fails_for_a_moment_is_asked_for_again(folder: Path, fault: int | str) -> None:
    with Store(folder, _times(2, fault)) as store:
        split = open_dataset(store.url).split("train")
        assert split.read([0, 119]) == [record(0), record(119)]
        assert len(store.asked) == 3 * (2 + 4)  # manifest, table; footer and row group of two shards


@pytest.mark.parametrize("fault", [503, "cut"])
def test_what_does_not_get_better_is_told_with_its_url(folder: Path, fault: int | str) -> None:
    with Store(folder, lambda asked: fault if "train-00001" in asked.file else None) as store:
        split = open_dataset(store.url).split("train")
        split.read([0])
        with pytest.raises(
            ValueError, match=r"web://.*train-00001\.parquet: 6 tries in .*OSError|IncompleteRead.*again"
        ):
            split.read([20])
        assert len([asked for asked in store.asked if "train-00001" in asked.file]) == stores.ATTEMPTS


def test_a_server_that_says_nothing_does_not_hang(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.web.TIMEOUT_S", 0.1)
    monkeypatch.setattr(stores, "ATTEMPTS", 2)

    def sleep(asked: Asked) -> None:
        time.sleep(0.5 if "train-0" in asked.file else 0)

    with Store(folder, sleep) as store, pytest.raises(ValueError, match="2 tries.*timed out"):
        open_dataset(store.url).split("train").read([0])


def test_a_missing_shard_and_a_missing_set_are_told_at_once(folder: Path) -> None:
    with Store(folder, lambda asked: 404 if "train-00001" in asked.file else None) as store:
        split = open_dataset(store.url).split("train")
        with pytest.raises(ValueError, match=r"train-00001\.parquet is missing"):
            split.read([20])
        assert len([asked for asked in store.asked if "train-00001" in asked.file]) == 1
        with pytest.raises(ValueError, match="holds no data set"):
            open_dataset(f"{store.url}/elsewhere")


def test_a_replaced_or_damaged_shard_is_told(folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", 120)
    shard = tmp_path / "set" / open_dataset(tmp_path / "set").index("train")[1].file
    content = bytearray(shard.read_bytes())
    at = content.index(b"\x89PNG") + 40
    content[at] ^= 0xFF
    shard.write_bytes(content)
    with Store(tmp_path / "set") as store:
        with pytest.raises(ValueError, match=rf"{shard.name}, row group 0: can't be read"):
            open_dataset(store.url).split("train").read(range(30))
        with pytest.raises(ValueError, match=f"{shard.name}: checksum"):
            open_dataset(store.url).verify()
        shard.write_bytes(content[:-200] + b"x" * 200)
        with pytest.raises(ValueError, match=rf"{shard.name} is not the file of the manifest"):
            open_dataset(store.url).split("train").read(range(30))


def test_a_missing_driver_and_an_unknown_protocol_are_told() -> None:
    fsspec.register_implementation(
        "nodriver", "no_such_module.Files", errtxt="Please install nodriver-fs", clobber=True
    )
    with pytest.raises(ValueError, match="nodriver://bucket/set: its driver is not installed .*install that with pip"):
        open_dataset("nodriver://bucket/set")
    with pytest.raises(ValueError, match="abc://x: .*give a folder or a URL"):
        open_dataset("abc://x")


class Waiting(AsyncFileSystem):  # type: ignore[misc]
    """An asynchronous driver, as those of s3 and http are; it waits before it reads from memory."""

    protocol, cachable, seconds = "waiting", False, 0.0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.replace("waiting://", "memory://")

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        await asyncio.sleep(self.seconds)
        return fsspec.filesystem("memory").cat_file(path, start=start, end=end)  # type: ignore[no-any-return]


def test_asynchronous_drivers_have_a_limit_of_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("waiting", Waiting, clobber=True)
    fsspec.filesystem("memory").put(str(folder), "/waiting-set", recursive=True)
    split = open_dataset("waiting://waiting-set").split("train")
    assert split.read([3]) == [record(3)]
    for name, value in {"REQUEST_S": 0.05, "ATTEMPTS": 2}.items():
        monkeypatch.setattr(stores, name, value)
    monkeypatch.setattr(Waiting, "seconds", 5.0)
    started = time.monotonic()
    with pytest.raises(ValueError, match="waiting://waiting-set/.*2 tries in .*Timeout"):
        split.read([100])
    assert time.monotonic() - started < 2


@pytest.fixture
def split_behind_a_slow_line(folder: Path, tmp_path: Path) -> Iterator[tuple[Store, Split]]:
    with Store(folder, lambda _: time.sleep(0.02)) as store:
        split = open_dataset(store.url).split("train", read_ahead=3)
        yield store, split
        split.close()


def test_what_comes_next_is_fetched_before_it_is_asked_for(split_behind_a_slow_line: tuple[Store, Split]) -> None:
    store, split = split_behind_a_slow_line
    split.ahead([4, 2, 9])
    deadline = time.monotonic() + 5
    while not all(future.done() for future in split._coming.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
    before = len(store.asked)
    starts = split.index.starts(np.array([4, 2, 9])).tolist()
    assert [found.key for found in split.read(starts)] == [f"pair/{start}" for start in starts]
    assert len(store.asked) == before  # nothing was asked for by reading


def test_a_fetch_ahead_that_fails_is_tried_again_when_the_rows_are_read(folder: Path) -> None:
    down = True
    with Store(folder, lambda asked: 503 if down and "train-0" in asked.file else None) as store:
        split = open_dataset(store.url).split("train", read_ahead=2)
        split.ahead([0, 1, 2])
        while not all(future.done() for future in split._coming.values()):
            time.sleep(0.01)
        down = False
        assert split.read([0, 8]) == [record(0), record(8)]
        split.close()


def test_closing_does_not_wait_for_a_store_that_is_gone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_WAIT_S", 5.0)
    with Store(folder, lambda asked: 503 if "train-0" in asked.file else None) as store:
        split = open_dataset(store.url).split("train", read_ahead=2)
        split.ahead(range(8))
        time.sleep(0.2)
        started = time.monotonic()
        split.close()
        assert time.monotonic() - started < 2
