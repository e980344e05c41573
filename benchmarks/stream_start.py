"""A data set of very many shards, and how soon its stream begins; `stream.py start` runs it in processes of its own."""

import hashlib
import json
import os
import resource
import shutil
import time
from pathlib import Path

import torch

from m2_ds.data.config import DataConfig
from m2_ds.data.index import ShardIndex, write_index
from m2_ds.data.reader import index_info, open_dataset
from m2_ds.data.records import Manifest, ShardInfo, SplitInfo
from m2_ds.data.row_groups import footer_length
from m2_ds.data.shards import ShardWriter
from m2_ds.data.sources import scenes
from m2_ds.data.stream import build_loader
from m2_ds.data.text import load_tokenizer

BATCH = 64


def make_manifest(folder: Path, shards: int, groups: int = 40, rows: int = 256) -> None:
    """A data set of ``shards`` links to real shards, unless it is there."""
    if (folder / "manifest.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    real = folder / "real"
    scenes.build(folder / "scenes", train=512, val=0, test=0)
    source = open_dataset(folder / "scenes").split("train").read(range(512))
    with ShardWriter(real, "start", group_rows=rows, shard_bytes=1 << 40) as writer:
        for number in range(groups * rows):
            record = source[number % len(source)]
            record.key = str(number)
            writer.add("train", record)
    (about,) = open_dataset(real).index("train")
    file, infos = real / about.file, []
    (folder / "train").mkdir()
    for number in range(shards):
        if number % 20_000 == 0:  # a file can have so many links only
            base = folder / f"base-{number}.parquet"
            shutil.copyfile(file, base)
        name = f"train/train-{number:05d}.parquet"
        os.link(base, folder / name)
        digest = hashlib.sha256(str(number).encode()).hexdigest()  # of their own, as those of real shards
        infos.append(
            ShardInfo(
                file=name, rows=groups * rows, row_groups=[rows] * groups, bytes=about.bytes, sha256=digest,
                footer=footer_length(file),
            )
        )  # fmt: skip
    content = write_index(infos)
    (folder / "manifest.train.parquet").write_bytes(content)
    total = shards * groups * rows
    info = SplitInfo(
        rows=total,
        languages={"en": total, "zh": total},
        sources={"start": total},
        counts=[],
        index=index_info("manifest.train.parquet", ShardIndex.read(content), content),
    )
    manifest = Manifest(schema_version=2, name="start", splits={"train": info})
    first = {"schema_version": 1, "name": "start", "splits": {"train": {
        "rows": total, "languages": info.languages, "sources": info.sources,
        "shards": [one.model_dump(exclude={"footer"}) for one in infos],
    }}}  # fmt: skip
    (folder / "manifest-1.json").write_text(json.dumps(first, indent=1))
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1))


def first_batch(folder: Path, tokenizer: Path) -> dict[str, float]:
    """Seconds of each part up to the first batch of 64 pairs, wall and processor, and the memory that it took, MB."""
    torch.set_num_threads(1)
    data = DataConfig.model_validate({"sources": [{"path": folder}], "image_size": 48})
    text = load_tokenizer(tokenizer)
    before, cpu = _memory_mb(), time.process_time()
    start = time.perf_counter()
    loader = build_loader(data, text, global_batch=BATCH, micro_batch=BATCH, seed=0)
    made = time.perf_counter()
    batches = iter(loader)
    next(batches)
    end = time.perf_counter()
    cpu = time.process_time() - cpu
    batches.close()  # type: ignore[attr-defined]
    index, order = loader.dataset.splits[0].index, loader.dataset.order.sources[0]
    arrays = [*vars(index).values(), *(array for kept in order._epochs.results.values() for array in kept)]
    return {
        "build": made - start,
        "batch": end - made,
        "in all": end - start,
        "cpu": cpu,
        "index_mb": sum(array.nbytes for array in arrays if hasattr(array, "nbytes")) / 1e6,
        "memory_mb": _memory_mb() - before,
    }


def _memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
