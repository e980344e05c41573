"""A data set to an object store: shards first, their tables next, the manifest last.

So a URL without a manifest is no data set, and one with a manifest is whole. What was sent is written down at the URL
(`.upload.json`: checksums) while shards are under way, so that an upload that was cut off goes on where it stood.
"""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from tyro.conf import Positional

from m2_ds.data.progress import track
from m2_ds.data.reader import MANIFEST, Dataset, open_dataset
from m2_ds.data.records import ShardInfo
from m2_ds.data.store import RemoteStore, open_store

JOURNAL = ".upload.json"
_JOURNAL_EVERY_S = 20.0


def upload(folder: Positional[Path], url: Positional[str], *, threads: int = 4, overwrite: bool = False) -> None:
    """Copy a data set to an object store, from where training reads it (data.sources.0.path: URL).

    Checksums are compared before a shard is sent and sizes after it. The same command goes on with an upload that was
    cut off, and does nothing where the data set is there already.

    Args:
        folder: the data set's folder, with its manifest.json.
        url: where it will lie: s3://bucket/set, gs://..., any URL that fsspec has a driver for.
        threads: shards sent at a time.
        overwrite: replace another data set at the URL; its manifest goes first.

    Raises:
        ValueError: another data set is there; a shard is damaged; the store refuses.
    """
    dataset = open_dataset(folder)
    store = open_store(url)
    if not isinstance(store, RemoteStore):
        raise ValueError(f"{url} is no URL: give one as in s3://bucket/set, or copy the folder (cp -r)")
    # In schema version 1 the manifest itself lists the shards.
    tables = sorted({info.index.file for info in dataset.manifest.splits.values()} - {MANIFEST})
    manifest = Path(folder, MANIFEST).read_bytes()
    there = _there(store)
    if there == manifest:
        print(f"{url}: the data set is there already")
        return
    if there is not None:
        if not overwrite:
            raise ValueError(f"{url} holds another data set; choose another URL, or say --overwrite")
        store.remove(MANIFEST)
    shards = [shard for name in dataset.splits for shard in dataset.index(name)]
    sent = _Journal(store)
    missing = [shard for shard in shards if not _is_there(store, shard, sent)]
    print(f"{url}: {len(shards)} shards, {len(shards) - len(missing)} of them there already", flush=True)
    _send_all(dataset, store, missing, sent, threads)
    for name in tables:
        store.put(name, Path(folder, name).read_bytes())
    store.put(MANIFEST, manifest)
    store.remove(JOURNAL)
    print(f"{url}: {sum(shard.bytes for shard in missing) / 1e9:.2f} GB sent, the data set is whole")


class _Journal:
    """Checksums of the shards that were sent, by file; written to the store now and then, and at the end."""

    def __init__(self, store: RemoteStore) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._written = time.monotonic()
        try:
            self.done: dict[str, str] = json.loads(store.read(JOURNAL))
        except (FileNotFoundError, json.JSONDecodeError):
            self.done = {}

    def add(self, shard: ShardInfo) -> None:
        with self._lock:
            self.done[shard.file] = shard.sha256
            if time.monotonic() - self._written > _JOURNAL_EVERY_S:
                self._write()

    def close(self) -> None:
        with self._lock:
            self._write()

    def _write(self) -> None:
        self.store.put(JOURNAL, json.dumps(self.done).encode())
        self._written = time.monotonic()


def _there(store: RemoteStore) -> bytes | None:
    try:
        return store.read(MANIFEST)
    except FileNotFoundError:
        return None


def _is_there(store: RemoteStore, shard: ShardInfo, sent: _Journal) -> bool:
    return sent.done.get(shard.file) == shard.sha256 and store.size(shard.file) == shard.bytes


def _send_all(dataset: Dataset, store: RemoteStore, shards: list[ShardInfo], sent: _Journal, threads: int) -> None:
    with ThreadPoolExecutor(threads, thread_name_prefix="m2-upload") as pool:
        futures = [pool.submit(_send, dataset, store, shard, sent) for shard in shards]
        try:
            for future in track(futures, "uploading", total=len(futures)):
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)  # those under way end first: the journal knows them
            sent.close()


def _send(dataset: Dataset, store: RemoteStore, shard: ShardInfo, sent: _Journal) -> None:
    dataset.verify_shard(shard)
    store.put_file(Path(dataset.folder, shard.file), shard.file)
    if (size := store.size(shard.file)) != shard.bytes:
        raise ValueError(f"{store.where(shard.file)} has {size} bytes after it was sent, not {shard.bytes}; try again")
    sent.add(shard)
