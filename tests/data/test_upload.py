"""A data set to an object store: whole or absent, resumed where it stood, never a mixture of two."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from m2_ds.data import store as stores
from m2_ds.data.reader import open_dataset
from m2_ds.data.store import RemoteStore
from m2_ds.data.upload import upload
from tests.support.pairs import make_dataset, record

URL = "memory://uploads/set"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stores, "FIRST_WAIT_S", 0.001)
    memory = fsspec.filesystem("memory")
    if memory.exists("/uploads"):
        memory.rm("/uploads", recursive=True)
    make_dataset(tmp_path / "set", 120, val=9)
    return tmp_path / "set"


def there() -> set[str]:
    return {path.removeprefix("/uploads/set/") for path in fsspec.filesystem("memory").find("/uploads")}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files in the order in which they were sent."""
    found: list[str] = []
    put_file, put = RemoteStore.put_file, RemoteStore.put

    def spied_file(self: RemoteStore, source: Path, name: str) -> None:
        found.append(name)
        put_file(self, source, name)

    def spied(self: RemoteStore, name: str, content: bytes) -> None:
        found.append(name)
        put(self, name, content)

    monkeypatch.setattr(RemoteStore, "put_file", spied_file)
    monkeypatch.setattr(RemoteStore, "put", spied)
    return found


def test_what_was_uploaded_is_read_and_the_manifest_comes_last(folder: Path, sent: list[str]) -> None:
    upload(folder, URL + "/")
    dataset = open_dataset(URL)
    assert dataset.split("train").read([0, 119]) == [record(0), record(119)]
    assert dataset.digest == open_dataset(folder).digest and dataset.verify() == 10
    assert sent[-3:] == ["manifest.train.parquet", "manifest.val.parquet", "manifest.json"]
    assert there() == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    sent.clear()
    upload(folder, URL)
    assert not sent


def test_an_upload_that_was_cut_off_goes_on(folder: Path, sent: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [shard.file for shard in open_dataset(folder).index("train")]
    put_file = RemoteStore.put_file

    def fail(self: RemoteStore, source: Path, name: str) -> None:
        if name == shards[5]:
            raise ValueError("the line is cut")
        put_file(self, source, name)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "put_file", fail)
        with pytest.raises(ValueError, match="the line is cut"):
            upload(folder, URL, threads=1)
    with pytest.raises(ValueError, match="holds no data set"):
        open_dataset(URL)
    before = {name for name in sent if name.endswith("parquet")}
    assert shards[4] in before
    sent.clear()
    # What was cut short at the store since is sent again, although it was written down.
    fsspec.filesystem("memory").pipe_file(f"/uploads/set/{shards[2]}", b"short")
    upload(folder, URL, threads=3)
    assert not (before - {shards[2]}) & set(sent)
    assert {shards[2], shards[5]} <= set(sent)
    assert open_dataset(URL).verify() and ".upload.json" not in there()


def test_another_set_is_only_replaced_when_asked_for(folder: Path, tmp_path: Path, sent: list[str]) -> None:
    upload(folder, URL)
    make_dataset(tmp_path / "other", 50, name="other")
    with pytest.raises(ValueError, match="holds another data set.*--overwrite"):
        upload(tmp_path / "other", URL)
    assert open_dataset(URL).name == "pair"
    sent.clear()
    upload(tmp_path / "other", URL, overwrite=True)
    assert open_dataset(URL).split("train").read([7]) == [record(7, "other")]
    # Shards of the same names and other content were sent, every one.
    assert {shard.file for shard in open_dataset(tmp_path / "other").index("train")} <= set(sent)


def test_a_damaged_shard_is_not_sent(folder: Path) -> None:
    shard = open_dataset(folder).index("train")[3]
    content = bytearray((folder / shard.file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / shard.file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.file}: checksum"):
        upload(folder, URL)
    assert shard.file not in there() and "manifest.json" not in there()


def test_stores_that_fail_for_a_moment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Any = type(fsspec.filesystem("memory"))
    calls: dict[str, int] = {}
    pipe_file = memory.pipe_file

    def flaky(self: Any, path: str, value: bytes, **options: Any) -> None:
        calls[path] = calls.get(path, 0) + 1
        if calls[path] < 3:
            raise ConnectionError("try again")
        pipe_file(self, path, value, **options)

    monkeypatch.setattr(memory, "pipe_file", flaky)
    upload(folder, URL)
    assert open_dataset(URL).verify()


def test_a_folder_is_no_url(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no URL"):
        upload(folder, str(tmp_path / "copy"))


def test_a_set_of_version_1_is_uploaded_as_it_is(folder: Path) -> None:
    dataset = open_dataset(folder)
    old = {
        name: {
            "rows": info.rows,
            "languages": info.languages,
            "sources": info.sources,
            "shards": [shard.model_dump(exclude={"footer"}) for shard in dataset.index(name)],
        }
        for name, info in dataset.manifest.splits.items()
    }
    for file in folder.glob("manifest.*"):
        file.unlink()
    (folder / "manifest.json").write_text(json.dumps({"schema_version": 1, "name": "pair", "splits": old}))
    upload(folder, URL)
    assert open_dataset(URL).split("train").read([0, 119]) == [record(0), record(119)]
