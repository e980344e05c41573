#!/usr/bin/env python
"""The stream beside webdataset and Hugging Face datasets, how soon it starts, and what sorting by length saves.

    python benchmarks/stream.py throughput --png data/emoji
    python benchmarks/stream.py start
    python benchmarks/stream.py lengths --tokenizer data/tokenizer-emoji

The peer `datasets` is needed by this benchmark alone: pip install datasets==5.2.0 (webdataset is a requirement).

Throughput: pictures a second of processor time, which other programs on the machine disturb little (of wall time, too,
in the last column), of one process on one core, from files on disk to uint8 batches [64, 3, S, S] of whole
pictures resized to the square by antialiased bicubic, the sides in turns, medians.

    jpeg   640 x 480, about 83 kB, to 224
    png    128 x 128 to 48: scenes by default, or a data set given with --png

Every side shuffles: m2_ds as it always does, the peers with a buffer of 1,000. webdataset reads tars of the same bytes,
datasets the same Parquet shards, streaming, the columns image and captions. The peers decode and resize as their users
do, with Pillow; in rows "m2_ds's decoding" they are given this project's functions for both, so that what is left is
reading. m2_ds also draws a caption and encodes it, the peers leave text as it is.

Start: seconds from a manifest of many shards to the first batch of 64 pairs, in a process of its own, imports not
counted, files in the page cache; memory is what the process grew by. Every shard has 40 row groups of 256 rows; the
files are links to a few real ones.

Lengths: tokens that run where padding is computed, with pairs of a step cut into micro-batches as they come and by
length; on captions of the data sets, and on made-up ones of log-normal length.
"""

import io
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import stream_start
import torch
import tyro
from loader import HERE, SIZES, Case, make_sets, make_tokenizer, on_core
from peer import make_tars
from PIL import Image
from tables import machine, publish

from m2_ds.data.batch import PairBatch, by_length
from m2_ds.data.config import AugmentConfig, DataConfig
from m2_ds.data.image import TrainTransform, decode
from m2_ds.data.memory import keep_freed_memory
from m2_ds.data.reader import open_dataset
from m2_ds.data.stream import build_loader
from m2_ds.data.text import load_tokenizer

RESULTS = HERE / "results"
WHOLE = AugmentConfig(crop_scale=(1.0, 1.0))
BATCH, BUFFER = 64, 1000
Side = Literal["m2_ds", "webdataset", "webdataset, m2_ds's decoding", "datasets", "datasets, m2_ds's decoding"]
SIDES: tuple[Side, ...] = (
    "m2_ds", "webdataset", "webdataset, m2_ds's decoding", "datasets", "datasets, m2_ds's decoding"
)  # fmt: skip


# -- throughput -------------------------------------------------------------------------------------------------------


def to_square(size: int, ours: bool) -> Callable[[bytes], torch.Tensor]:
    """From a picture's bytes to uint8 [3, size, size], as the peers' users do it or with m2_ds's functions."""
    if ours:
        transform = TrainTransform(WHOLE, size, 0)
        (draw,) = transform.draws(np.arange(1))
        scale = transform.scale(draw)
        return lambda data: transform.geometry(np.array(decode(data, scale)), draw)

    def usual(data: bytes) -> torch.Tensor:
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()

    return usual


def pictures_of(side: Side, folder: Path, tars: Path, tokenizer: Path, size: int) -> Iterable[torch.Tensor]:
    """Batches of pictures of one side, without end or for several epochs."""
    if side == "m2_ds":
        data = DataConfig.model_validate(
            {"sources": [{"path": folder}], "languages": {"en": 1.0}, "image_size": size, "augment": WHOLE}
        )
        loader = build_loader(data, load_tokenizer(tokenizer), global_batch=BATCH, micro_batch=BATCH, seed=0)
        return (batch.images for batch in loader)
    square = to_square(size, "m2_ds" in side)
    if side.startswith("webdataset"):
        import webdataset

        names = sorted(str(path) for path in tars.glob("*.tar"))
        rows = webdataset.WebDataset(names * 1000, shardshuffle=100, seed=0).shuffle(BUFFER)
        pictures = (square(row.get("jpg") or row["png"]) for row in rows)
    else:
        import datasets

        datasets.disable_progress_bars()
        files = [str(folder / file) for file in open_dataset(folder).index("train").files()]
        rows = datasets.load_dataset("parquet", data_files=files * 20, split="train", streaming=True)
        rows = rows.select_columns(["image", "captions"]).shuffle(seed=0, buffer_size=BUFFER)
        pictures = (square(row["image"]) for row in rows)
    return batched(pictures)


def batched(pictures: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    waiting = []
    for picture in pictures:
        waiting.append(picture)
        if len(waiting) == BATCH:
            yield torch.stack(waiting)
            waiting = []


def turn(side: Side, folder: Path, tars: Path, tokenizer: Path, size: int, pictures: int) -> tuple[float, float]:
    """Pictures a second of processor time and of wall time, after the buffers are full."""
    torch.set_num_threads(1)
    keep_freed_memory()
    batches = iter(pictures_of(side, folder, tars, tokenizer, size))
    for _ in range(9):  # what was made ahead
        next(batches)
    start, cpu, done = time.perf_counter(), time.process_time(), 0
    while done < pictures:
        done += len(next(batches))
    return done / (time.process_time() - cpu), done / (time.perf_counter() - start)


def in_process(core: int, function: str, arguments: tuple[Any, ...]) -> Any:
    """What a function of this file gives in a process of its own on one core."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from pathlib import *; import json, stream, stream_start; "
    return json.loads(on_core(core, [sys.executable, "-c", code + f"print(json.dumps({function}(*{arguments!r})))"]))


def throughput(
    *,
    png: Path | None = None,
    cases: tuple[Case, ...] = ("jpeg", "png"),
    turns: int = 5,
    pictures: int = 1024,
    core: int | None = None,
    work: Path = Path("build/stream"),
    out: Path = RESULTS / "stream.json",
) -> None:
    """Pictures a second and core of every side, in turns.

    Args:
        png: data set of 128 px PNGs with a train split; by default scenes are generated.
        cases: what to measure.
        turns: turns of each side.
        pictures: pictures timed in a turn; four times as many for png.
        core: the core that all use; by default the last one this process may use.
        work: folder for data sets and tars.
        out: results, joined with those of `start` and `lengths`; a table ending in .md is written beside it.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    core = max(os.sched_getaffinity(0)) if core is None else core
    sets, tokenizer = make_sets(work, png, cases)
    rows = []
    for case in cases:
        tars = make_tars.write(sets[case], work / f"{case}-tars", languages=("en",), shards=4)
        found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        asked = pictures * (4 if case == "png" else 1)
        for _ in range(turns):
            for side in SIDES:
                arguments = (side, sets[case].resolve(), tars.resolve(), tokenizer.resolve(), SIZES[case], asked)
                found[side].append(in_process(core, "stream.turn", arguments))
            print(case, {side: round(rates[-1][0]) for side, rates in found.items()}, flush=True)
        medians = {side: [statistics.median(rates) for rates in zip(*taken)] for side, taken in found.items()}
        rows.append({"case": case, "pictures_per_s": medians, "turns": found})
    versions = {name: version(name) for name in ("torch", "pillow", "pyarrow", "webdataset", "datasets")}
    save(out, {"throughput": rows, "versions": versions})


# -- start ------------------------------------------------------------------------------------------------------------


def start(
    *,
    shards: tuple[int, ...] = (1_000, 10_000, 100_000),
    turns: int = 5,
    core: int | None = None,
    work: Path = Path("build/stream"),
    out: Path = RESULTS / "stream.json",
) -> None:
    """Seconds to the first batch for manifests of several sizes.

    Args:
        shards: numbers of shards of the manifests.
        turns: times that each is measured.
        core: the core to run on; by default the last one this process may use.
        work: folder for the manifests; what is made for them is removed again.
        out: results, joined with those of the others.
    """
    core = max(os.sched_getaffinity(0)) if core is None else core
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(work)
    rows = []
    for count in shards:
        folder = work / f"start-{count}"
        stream_start.make_manifest(folder, count)
        found = [
            in_process(core, "stream_start.first_batch", (folder.resolve(), tokenizer.resolve())) for _ in range(turns)
        ]
        row = {name: statistics.median(one[name] for one in found) for name in found[0]}
        sizes = {name: (folder / name).stat().st_size / 1e6 for name in ("manifest.train.parquet", "manifest-1.json")}
        (folder / "manifest.json").write_bytes((folder / "manifest-1.json").read_bytes())
        old = in_process(core, "stream_start.first_batch", (folder.resolve(), tokenizer.resolve()))
        rows.append(
            {"shards": count, **row, "version_1": old, "file_mb": sizes, "turns": [one["in all"] for one in found]}
        )
        print({name: round(value, 3) for name, value in row.items()}, flush=True)
        shutil.rmtree(folder)
    save(out, {"start": rows})


# -- lengths ----------------------------------------------------------------------------------------------------------


def lengths(
    *,
    datasets: tuple[Path, ...] = (Path("data/emoji"), Path("data/scenes")),
    tokenizer: Path = Path("data/tokenizer-emoji"),
    micro_batch: int = 64,
    accumulation: tuple[int, ...] = (4, 16),
    out: Path = RESULTS / "stream.json",
) -> None:
    """Text tokens that run for a real one, with and without data.sort_by_length, where padding is computed.

    Args:
        datasets: data sets whose captions are counted; a caption of log-normal length (median 20) comes last.
        tokenizer: counts their tokens.
        micro_batch: pairs of a micro-batch.
        accumulation: micro-batches of a step.
        out: results, joined with those of the others.
    """
    text, random = load_tokenizer(tokenizer), np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for folder in datasets:
        captions = [row["captions"] for row in open_dataset(folder).split("train").iter(["captions"])]
        counts = [len(text.pieces(random.choice([caption["text"] for caption in of]))) for of in captions]
        found[folder.name] = random.permutation(np.minimum(counts, text.max_length))
    found["log-normal"] = np.clip(np.exp(random.normal(np.log(20), 0.6, 20_000)), 4, 77).astype(int)
    rows = []
    for name, of in found.items():
        for steps in accumulation:
            share = of[: len(of) // (micro_batch * steps) * micro_batch * steps].reshape(-1, steps, micro_batch)
            plain = sum(int(part.max()) * micro_batch for step in share for part in step)
            ordered = sum(_computed(step) for step in share)
            rows.append(
                {"captions": name, "mean": float(share.mean()), "micro_batches": steps,
                 "plain": plain / int(share.sum()), "sorted": ordered / int(share.sum())}
            )  # fmt: skip
    save(out, {"lengths": rows})


def _computed(step: np.ndarray) -> int:
    """Tokens that run of a step's lengths [micro-batches, pairs], through the stream's own function."""
    batches = []
    for part in step:
        mask = (torch.arange(int(part.max())) < torch.from_numpy(part)[:, None]).long()[None]
        zeros = torch.zeros(len(part), dtype=torch.int64)
        images = torch.zeros(len(part), 3, 1, 1, dtype=torch.uint8)
        batches.append(PairBatch(images, mask, mask, zeros[None], zeros, zeros, [""] * len(part), {}))
    return sum(batch.ids.numel() for batch in by_length(batches, "cpu"))


# -- results ----------------------------------------------------------------------------------------------------------


def save(out: Path, part: dict[str, Any]) -> None:
    """Join a part with what is there, write it and the table, and print that."""
    content = json.loads(out.read_text()) if out.exists() else {}
    content |= part | machine()
    publish(out, content, table(content))


def table(content: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [f"# The stream\n\n{content['cpu']}, one core; {content['date']}. Medians."]
    if "throughput" in content:
        versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
        lines += [f"\n## Pictures a second and core\n\n{versions}; sides in turns.\n"]
        lines += ["| case | side | of processor time | turns | m2_ds is | of wall time |", "|---|---|---|---|---|---|"]
        for row in content["throughput"]:
            for side, (rate, wall) in row["pictures_per_s"].items():
                turns = ", ".join(f"{value:.0f}" for value, _ in row["turns"][side])
                ratio = row["pictures_per_s"]["m2_ds"][0] / rate
                lines.append(f"| {row['case']} | {side} | {rate:.0f} | {turns} | {ratio:.2f} x | {wall:.0f} |")
    if "start" in content:
        lines += ["\n## Seconds to the first batch of 64 pairs\n"]
        head = "| shards | rows | open_dataset and build_loader | first batch | in all | turns | processor time "
        head += "| index and order, MB | process grew, MB | table, MB | from version 1, s (processor) / MB |"
        lines += [head, "|---" * 11 + "|"]
        for row in content["start"]:
            turns = ", ".join(f"{value:.2f}" for value in row["turns"])
            old = f"{row['version_1']['cpu']:.2f} / {row['file_mb']['manifest-1.json']:.0f}"
            cells = [
                f"{row['shards']:,}", f"{row['shards'] * 10_240:,}", f"{row['build']:.2f}", f"{row['batch']:.2f}",
                f"{row['in all']:.2f}", turns, f"{row['cpu']:.2f}", f"{row['index_mb']:.1f}", f"{row['memory_mb']:.0f}",
                f"{row['file_mb']['manifest.train.parquet']:.1f}", old,
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    if "lengths" in content:
        lines += ["\n## Text tokens that run for a real one, where padding is computed; 64 pairs a micro-batch\n"]
        lines += ["| captions | mean tokens | micro-batches | as they come | by length |", "|---|---|---|---|---|"]
        for row in content["lengths"]:
            lines.append(
                f"| {row['captions']} | {row['mean']:.1f} | {row['micro_batches']} | {row['plain']:.2f} | "
                f"{row['sorted']:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"throughput": throughput, "start": start, "lengths": lengths}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
