#!/usr/bin/env python
"""What tensor and pipeline parallelism save and send: memory by rank, bytes a layer, and a slice of the 10B model.

    python benchmarks/model_parallel.py memory
    python benchmarks/model_parallel.py traffic
    python benchmarks/model_parallel.py ten-billion-slice

All on random pairs, with real steps under DeepSpeed; ranks are processes of this machine. Results go to
benchmarks/results, as JSON and as a table.

Memory. What the engine holds right before an update, by kind, is counted over its tensors: weights, gradients, and the
optimizer's masters and moments. The peak is measured: of a CPU the peak resident set beyond that before the model was
built (the libraries have then run a step of a small model), with glibc told to return what is freed; on CUDA torch's
own count. "Passes" is the rest of the peak of forward and backward (activations, buckets, the libraries' workspace),
"update" the rest of the update's (ZeRO flattens all gradients once more). Peaks are of steps 2 and on: in the first the
optimizer makes its state.

Traffic. What a rank sends in a forward and backward is counted where collectives are called and must equal the formula
of m2_ds/plan/tensor_traffic.py, which says how it is derived.
"""

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tyro
from model_parallel_rank import Count, Counted, Layout, Measured, Precision, Steps
from tables import machine, publish

from m2_ds.model.config import PRESETS, M2EncoderConfig
from m2_ds.model.stack import Part
from m2_ds.plan.layout import Load
from m2_ds.plan.tensor_traffic import Sent, part_bytes
from m2_ds.plan.work import Tokens, tokens_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LAYERS, NORMS = "tensor parallel", "tensor parallel norms"  # kinds of m2_ds.parallel.traffic
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}


# -- the formula ------------------------------------------------------------------------------------------------------


def rows_of(
    config: M2EncoderConfig, lengths: Sequence[int], sequence_ranks: int = 1, on_cpu: bool = True
) -> list[Tokens]:
    """Of a picture and a caption for each of ``lengths`` (tokens)."""
    load = Load(1, max(lengths), sum(lengths) / len(lengths))
    return tokens_of(config, load, len(lengths), on_cpu, sequence_ranks)


def model_bytes(
    config: M2EncoderConfig, rows: Sequence[Tokens], ranks: int, precision: Precision, sequence: bool
) -> Sent:
    """Of a forward and backward of both towers."""
    assert config.recompute != "selective" and config.drop_path == 0
    return part_bytes(config, Part.whole(config), rows, ranks, precision, sequence)


def found_bytes(counted: Counted) -> Sent:
    """What was counted, in the formula's parts."""
    return Sent(
        *(by_kind.get(kind, 0.0) for kind in (LAYERS, NORMS) for by_kind in (counted.forward, counted.backward))
    )


# -- processes --------------------------------------------------------------------------------------------------------


def launch(jobs: Sequence[Steps | Count]) -> list[list[dict[str, Any]]]:
    """Run jobs of one number of ranks, one after another; by job and rank what it found."""
    ranks = jobs[0].layout.ranks
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": str(2**20),
        }  # fmt: skip
        command = [
            sys.executable,
            str(HERE / "model_parallel_rank.py"),
            json.dumps([dataclasses.asdict(j) for j in jobs]),
        ]
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=environment, stdout=out, text=True))
    try:
        while processes[0].poll() is None and not any(process.poll() for process in processes):
            time.sleep(0.2)
        if any(process.poll() for process in processes):
            raise ValueError(f"a rank of {jobs[0].layout.name} failed; its error is above (killed: too little memory)")
        assert processes[0].stdout is not None
        by_rank = json.loads(processes[0].stdout.read().splitlines()[-1])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [list(found) for found in zip(*by_rank)]


def measure(job: Steps) -> list[Measured]:
    return [Measured(**found) for found in launch([job])[0]]


def facts() -> str:
    about = machine("torch", "deepspeed")
    versions = f"torch {about['torch']}, deepspeed {about['deepspeed']}"
    return f"{about['date']}, {about['cores']} cores ({about['cpu']}), gloo, {versions}"


def write(out: Path, title: str, content: Any, lines: Iterable[str]) -> None:
    """JSON, and a table of the same name ending in .md."""
    publish(out, {"machine": facts(), **content}, "\n".join([f"# {title}", "", *lines]) + "\n")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


def gb(number: float) -> str:
    return f"{number / 1e9:.2f}"


MEMORY_HEAD = ["weights", "gradients", "optimizer", "passes", "update", "peak"]


def memory_cells(found: Measured) -> list[str]:
    kinds = [found.weights, found.gradients, found.optimizer, found.passes_peak - found.held]
    return [gb(x) for x in (*kinds, found.update_peak - found.held, found.peak)]


# -- commands ---------------------------------------------------------------------------------------------------------


def memory(pairs: int = 4, out: Path = RESULTS / "model_parallel_memory.json") -> None:
    """Peak memory of every rank, dense and cut in two, where weights dominate.

    Balanced by arithmetic, stages differ in memory: the token table is the first one's, and in vision-language layers
    one branch does not train.

    Args:
        pairs: of a micro-batch; a step has two.
        out: results; a table of the same name ending in .md is written beside it.
    """
    model = {
        "hidden_size": 1024, "num_heads": 16, "num_layers": 4, "num_vl_layers": 2, "embed_dim": 1024, "image_size": 64,
        "vocab_size": 16384, "text_positions": 130, "max_text_length": 32,
    }  # fmt: skip
    layouts = (Layout(), Layout(2), Layout(2, sequence=True), Layout(1, 2), Layout(1, 2, balance="memory"))
    results: dict[Precision, dict[str, list[Measured]]] = {}
    for precision in BYTES:
        jobs = [Steps(layout, model, precision, pairs, 2, 3, (6, 17), 1e-4) for layout in layouts]
        results[precision] = {job.layout.name: measure(job) for job in jobs}
    lines = [
        f"{facts()}. Width 1024, 4 + 2 layers, 16,384 words, {pairs} pairs of 64 px a micro-batch, 2 micro-batches; "
        "AdamW under ZeRO 1. GB of every rank; peaks of steps 2 and 3. Passes, update: what the peak of each has "
        "beyond the three kinds before it.",
    ]
    for precision, by_layout in results.items():
        dense = by_layout["dense"][0].peak
        rows = [
            [
                name if rank == 0 else "", rank, found.stage_layers, *memory_cells(found), f"{found.peak / dense:.2f}",
                gb(found.first_peak),
            ]
            for name, ranks in by_layout.items()
            for rank, found in enumerate(ranks)
        ]  # fmt: skip
        head = ["layout", "rank", "layers", *MEMORY_HEAD, "of dense", "peak of start and step 1"]
        lines += ["", f"## {precision}", "", *table(head, rows)]
    content = {
        precision: {name: [dataclasses.asdict(found) for found in ranks] for name, ranks in by_layout.items()}
        for precision, by_layout in results.items()
    }
    write(out, "Memory of tensor and pipeline parallelism", content, lines)


def traffic(preset: str = "0.4b", pairs: int = 8, out: Path = RESULTS / "model_parallel_traffic.json") -> None:
    """Bytes that tensor parallelism sends, counted against the formula; the sub-LayerNorms' share for the presets.

    Args:
        preset: whose width and heads to count with, at 2 + 1 layers and, for a layer alone, 3 + 1.
        pairs: of the micro-batch.
        out: results; a table of the same name ending in .md is written beside it.
    """
    jobs = [
        Count(Layout(ranks, sequence=sequence), {**_shallow(preset), "recompute": recompute}, precision, pairs, (6, 25))
        for ranks in (2, 4)
        for sequence in (False, True)
        for recompute in ("none", "full")
        for precision in BYTES
    ]
    content, rows = [], []
    for ranks in (2, 4):
        of_ranks = [job for job in jobs if job.layout.ranks == ranks]
        deeper = [dataclasses.replace(job, model={**job.model, "num_layers": 3}) for job in of_ranks]
        by_job = launch([*of_ranks, *deeper])
        for job, by_rank, deep in zip(of_ranks, by_job, by_job[len(of_ranks) :]):
            counted = [found_bytes(Counted(**found)) for found in by_rank]
            config, lengths = M2EncoderConfig.model_validate(job.model), by_rank[0]["lengths"]
            sequence = job.layout.sequence
            of = rows_of(config, lengths, ranks if sequence else 1)
            formula = model_bytes(config, of, ranks, job.precision, sequence)
            counted_deep = found_bytes(Counted(**deep[0]))
            layer = [x - y for x, y in zip(dataclasses.astuple(counted_deep), dataclasses.astuple(counted[0]))]
            deep_formula = model_bytes(config.model_copy(update={"num_layers": 3}), of, ranks, job.precision, sequence)
            equal = all(found == formula for found in counted) and counted_deep == deep_formula
            content.append({
                "job": dataclasses.asdict(job), "rows": [dataclasses.asdict(x) for x in of], "equal": equal,
                "counted": [dataclasses.asdict(x) for x in counted], "formula": dataclasses.asdict(formula),
                "layer": layer,
            })  # fmt: skip
            rows.append([
                job.layout.name, config.recompute, job.precision,
                *(f"{x / 1e6:.4f}" for x in layer),
                *(f"{sum(dataclasses.astuple(x)):,.0f}" for x in (counted[0], formula)),
                "yes" if equal else "NO", f"{counted[0].norms_share:.2%}",
            ])  # fmt: skip
    head = ["layout", "recompute", "precision", "layer forward", "backward", "norms forward", "norms backward"]
    head += ["model counted", "formula", "equal", "norms' share"]
    lines = [
        f"{facts()}. {preset}'s width, {pairs} pairs of 64 px a micro-batch, captions of 6 to 24 tokens. A backbone "
        "layer, both modalities: MB of a rank, as a third layer adds them to two. Model: bytes of 2 + 1 layers, all "
        "four parts; \"equal\" compares each part on every rank, for 2 + 1 and 3 + 1 layers.", "",
        *table(head, rows), "", "## The sub-LayerNorms' share of what is sent, by formula", "",
        "64 pairs of 224 px, captions of 52 tokens, no recomputation, a GPU's packing. Of a layer it is 8 / (D e), "
        "whatever the ranks.", "",
        *table(["preset", "precision", "tp 2", "tp 4", "tp 8", "tp 8, sequence parallel"], _shares()),
    ]  # fmt: skip
    write(out, "Traffic of tensor parallelism", {"counted": content}, lines)
    if not all(x["equal"] for x in content):
        raise SystemExit("what was counted is not what the formula says")


def _shallow(preset: str) -> dict[str, Any]:
    changes = {"num_layers": 2, "num_vl_layers": 1, "image_size": 64, "vocab_size": 1000}
    return {**PRESETS[preset], **changes}


def _shares() -> list[list[str]]:
    rows = []
    for preset in ("0.4b", "1b", "10b"):
        config = M2EncoderConfig.preset(preset)
        for precision in BYTES:
            cells = []
            for ranks, sequence in ((2, False), (4, False), (8, False), (8, True)):
                of = rows_of(config, [52] * 64, ranks if sequence else 1, on_cpu=False)
                share = model_bytes(config, of, ranks, precision, sequence).norms_share
                cells.append("-" if config.num_heads % ranks else f"{share:.3%}")
            rows.append([preset if precision == "fp32" else "", precision, *cells])
    return rows


def ten_billion_slice(pairs: int = 4, lr: float = 1e-5, out: Path = RESULTS / "model_parallel_slice.json") -> None:
    """Three bf16 steps of 1 + 1 layers of the 10B model's width, dense and on two tensor-parallel ranks.

    Args:
        pairs: of the step, 224 px.
        lr: of AdamW. Its first updates are the gradients' signs: a large rate makes of rounding another model.
        out: results; a table of the same name ending in .md is written beside it.
    """
    needed = 16e9
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if free < needed:
        raise ValueError(f"{gb(free)} GB of memory are available, {gb(needed)} are needed; run it when there are")
    model = {**PRESETS["10b"], "num_layers": 1, "num_vl_layers": 1, "vocab_size": 16384}
    jobs = [Steps(layout, model, "bf16", pairs, 1, 3, (6, 17), lr) for layout in (Layout(), Layout(2))]
    results = {job.layout.name: measure(job) for job in jobs}
    dense = results["dense"][0]
    rows = [
        [
            name if rank == 0 else "", rank, *memory_cells(found), f"{found.peak / dense.peak:.2f}",
            f"{statistics.median(found.seconds[1:]):.1f}", *(f"{x:.4f}" for x in found.losses),
        ]
        for name, ranks in results.items()
        for rank, found in enumerate(ranks)
    ]  # fmt: skip
    apart = [abs(x / y - 1) for x, y in zip(results["tp 2"][0].losses, dense.losses)]
    head = ["layout", "rank", *MEMORY_HEAD, "of dense", "s a step", "loss 1", "loss 2", "loss 3"]
    lines = [
        f"{facts()}. Width 4096, 32 heads, embeddings of 1024, 1 + 1 layers, 16,384 words; {pairs} pairs of 224 px, "
        f"bf16, AdamW at {lr:g} under ZeRO 1. GB of every rank; peaks of steps 2 and 3, seconds their median.", "",
        *table(head, rows), "",
        "Losses are apart by " + ", ".join(f"{x:.1e}" for x in apart) + " of themselves; one rounding to bf16 is up to "
        f"{2**-9:.1e} of a number.",
    ]  # fmt: skip
    content = {name: [dataclasses.asdict(found) for found in ranks] for name, ranks in results.items()}
    write(out, "A slice of the 10B model", content, lines)


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {
        "memory": memory,
        "traffic": traffic,
        "ten-billion-slice": ten_billion_slice,
    }
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
