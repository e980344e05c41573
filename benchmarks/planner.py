#!/usr/bin/env python
"""How well m2_ds.plan predicts: memory peaks and step times of real runs on this machine, against its formulae.

    python benchmarks/planner.py                     # memory of 29 layouts, then three rounds of times: 45 minutes
    python benchmarks/planner.py --cluster this.yaml # with a file of m2 plan --measure, one round
    python benchmarks/planner.py --only tp           # layouts whose name holds a word

Real steps of the trainer's engine on random pairs, on one and two processes. Speeds come from ``m2 plan --measure``
alone: nothing is fitted to these runs. A round measures the machine and then runs the layouts, so that both see the
machine as it is then; of the rounds' ratios the median counts. Memory is the peak resident set of steps 2 and 3 beyond
what is there when the libraries have run a small model's step, with glibc told to return what is freed.
Results go to benchmarks/results/planner.json and .md.
"""

import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from model_parallel import facts, table
from tables import publish

from m2_ds.config import RunConfig
from m2_ds.plan.cluster import Cluster, load_cluster
from m2_ds.plan.layout import Candidate, Load
from m2_ds.plan.measure import measure_machine, start_ranks
from m2_ds.plan.search import Planner, Prediction
from m2_ds.plan.trial import Clock, trial_tree

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LENGTHS = (6, 17)
MEAN_LENGTH = (LENGTHS[0] + LENGTHS[1] - 1) / 2
MEMORY_GOAL, TIME_GOAL = 0.10, 0.20
SIDES = ("predicted", "measured")
Entry = dict[str, Any]
RETURNED = 2**16  # bytes from which glibc returns what is freed: smaller tensors leave holes, which are nobody's use
CPU_SECONDS = (
    " The machine was not quiet: times are CPU seconds of the busiest rank, one thread a process; of a pipeline "
    "predictions leave its bubble out, in which nothing works."
)

# Weights dominate the one, activations the other.
WIDE = {
    "hidden_size": 640, "num_heads": 10, "num_layers": 4, "num_vl_layers": 2, "embed_dim": 512, "image_size": 64,
    "vocab_size": 16384, "text_positions": 130, "max_text_length": 32,
}  # fmt: skip
LONG = {
    "hidden_size": 256, "num_heads": 4, "num_layers": 6, "num_vl_layers": 2, "embed_dim": 256, "image_size": 96,
    "patch_size": 8, "vocab_size": 4000, "text_positions": 130, "max_text_length": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """``pairs`` of a rank's micro-batch, ``k`` micro-batches a step; ``parallel``, ``engine``, ``loss``: fields of
    these."""

    name: str
    ranks: int
    model: dict[str, Any]
    pairs: int
    k: int = 1
    zero: str = "zero1"
    precision: str = "fp32"
    recompute: str = "none"
    parallel: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)

    @property
    def tree(self) -> dict[str, Any]:
        cut = self.parallel.get("tensor_parallel_size", 1) * self.parallel.get("pipeline_parallel_size", 1)
        batch = self.ranks // cut * self.pairs * self.k
        tree = trial_tree({**self.model, "recompute": self.recompute}, self.zero, batch, self.pairs, self.precision)
        tree["engine"] |= self.engine
        return {**tree, "parallel": self.parallel, "loss": self.loss}


def jobs() -> list[Job]:
    """The layouts: every axis by itself, and the usual ones together."""
    found = []
    for precision in ("fp32", "bf16"):
        found += [
            Job(f"wide, 1 rank, {precision}", 1, WIDE, 8, precision=precision),
            Job(f"wide, 1 rank, k 4, {precision}", 1, WIDE, 8, 4, precision=precision),
            Job(f"long, 1 rank, {precision}", 1, LONG, 24, precision=precision),
            Job(f"long, 1 rank, full, {precision}", 1, LONG, 24, precision=precision, recompute="full"),
            Job(f"long, dp 2, {precision}", 2, LONG, 12, precision=precision),
            Job(f"wide, dp 2, {precision}", 2, WIDE, 8, precision=precision),
            Job(f"wide, tp 2, {precision}", 2, WIDE, 8, precision=precision, parallel={"tensor_parallel_size": 2}),
            Job(
                f"wide, pp 2, k 4, {precision}", 2, WIDE, 8, 4, precision=precision,
                parallel={"pipeline_parallel_size": 2},
            ),
        ]  # fmt: skip
    both = {"tensor_parallel_size": 2, "sequence_parallel": True}
    found += [
        Job("long, 1 rank, selective, fp32", 1, LONG, 24, recompute="selective"),
        Job("long, tp 2 sp, k 2, fp32", 2, LONG, 12, 2, parallel=both),
        Job("long, dp 2, k 4, fp32", 2, LONG, 12, 4),
        Job("wide, 1 rank, zero0, fp32", 1, WIDE, 8, zero="zero0"),
        Job("wide, dp 2, zero0, bf16", 2, WIDE, 8, zero="zero0", precision="bf16"),
        Job("wide, dp 2, zero2, fp32", 2, WIDE, 8, zero="zero2"),
        Job("wide, dp 2, zero2, k 2 each, bf16", 2, WIDE, 8, 2, "zero2", "bf16", engine={"reduce_once": False}),
        Job("wide, dp 2, zero3, fp32", 2, WIDE, 8, zero="zero3"),
        Job("wide, dp 2, zero3, k 2, bf16", 2, WIDE, 8, 2, "zero3", "bf16"),
    ]
    words, patches = {"cmlm": {"weight": 1.0}}, {"cmim": {"weight": 1.0}}
    random = {"cmim": {"weight": 1.0, "choose": "random"}}
    found += [
        Job("long, 1 rank, masked words and patches, fp32", 1, LONG, 8, loss={**words, **patches}),
        Job("long, 1 rank, full, masked patches, bf16", 1, LONG, 8, precision="bf16", recompute="full", loss=patches),
        Job("wide, tp 2, masked words, fp32", 2, WIDE, 8, parallel={"tensor_parallel_size": 2}, loss=words),
        Job(
            "wide, pp 2, k 4, masked words and patches, fp32", 2, WIDE, 8, 4, parallel={"pipeline_parallel_size": 2},
            loss={**words, **random},
        ),
    ]  # fmt: skip
    return found


def launch(what: str, of: list[Job], steps: int, clock: Clock = "wall") -> Iterator[list[float]]:
    """By job what each of its ranks found, as they end; the jobs have as many ranks and run one after another."""
    more = {"MALLOC_MMAP_THRESHOLD_": str(RETURNED)} if what == "memory" else {}
    asked = json.dumps([{"tree": job.tree, "lengths": LENGTHS} for job in of])
    command = [sys.executable, str(HERE / "planner_rank.py"), what, asked, str(steps), clock]
    processes = start_ranks(command, of[0].ranks, clock, more)
    try:
        assert processes[0].stdout is not None
        answers = (line for line in processes[0].stdout if line.startswith("["))
        yield from (list(json.loads(line)) for line in answers)
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise ValueError(f"{what} of {', '.join(job.name for job in of)} failed ({codes}); the error is above")


def predict(job: Job, cluster: Cluster) -> Prediction:
    config = RunConfig.model_validate(job.tree)
    planner = Planner(job.tree, config, cluster.with_size(None, job.ranks), Load(1, LENGTHS[1] - 1, MEAN_LENGTH))
    return planner.predict(Candidate.of(config, job.ranks))


def main(
    cluster: Path | None = None,
    only: tuple[str, ...] = (),
    what: Literal["both", "memory", "time"] = "both",
    rounds: int = 3,
    steps: int = 7,
    clock: Clock = "wall",
    out: Path = RESULTS / "planner.json",
) -> None:
    """Run layouts and compare. What an earlier call found of other layouts stays in the results.

    Args:
        cluster: a file of m2 plan --measure; by default the machine is measured in every round.
        only: words; layouts whose name holds one of them are run.
        what: to measure.
        rounds: of times, with a measurement of the machine each; one where a cluster is given.
        steps: of a time; its median counts.
        clock: cpu: CPU seconds, one thread a process, where the machine is not quiet; bubbles are not in them.
        out: results; a table of the same name ending in .md is written beside it.
    """
    path = cluster or out.with_name("planner_cluster.yaml")
    entries: dict[str, Entry] = {}
    if out.exists():
        entries = {entry["name"]: entry for entry in json.loads(out.read_text())["layouts"]}
    chosen = [job for job in jobs() if any(word in job.name for word in only or [""])]
    for job in chosen:
        entries.setdefault(job.name, {"name": job.name})["job"] = asdict(job)
        if what != "memory":
            entries[job.name]["times"] = []

    def tell(job: Job, there: Cluster) -> None:
        print(" | ".join(row(entries[job.name])), flush=True)
        write_results(out, path, there, [entries[j.name] for j in jobs() if j.name in entries], clock)

    for number in range(1 if cluster or what == "memory" else rounds):
        if cluster is None:
            path.write_text(measure_machine(clock=clock))
        there = load_cluster(str(path))
        if what != "time" and number == 0:
            for job in chosen:
                (peaks,) = launch("memory", [job], 0)
                found = predict(job, there).worst
                predicted = found.peak + there.reserve_gb * 1e9
                entries[job.name]["memory"] = {"predicted": predicted, "measured": max(peaks), "kinds": found.at_peak}
                tell(job, there)
        if what != "memory":
            for job, seconds, load in timed(chosen, steps, clock):
                time = predict(job, there).time
                step = time.total - (time.parts.get("bubble", 0.0) if clock == "cpu" else 0.0)
                entries[job.name]["times"].append(
                    {"predicted": step, "measured": seconds, "parts": time.parts, "load": load}
                )
                tell(job, there)


def timed(chosen: list[Job], steps: int, clock: Clock) -> Iterator[tuple[Job, float, float]]:
    """Every job with its seconds of a step, of the slowest rank, and the machine's load before."""
    # ZeRO 3 replaces torch's linear layer for good, and a layout's groups stay: sets of processes of their own.
    sets: dict[tuple[object, ...], list[Job]] = {}
    for job in chosen:
        sets.setdefault((job.ranks, job.zero == "zero3", str(job.parallel)), []).append(job)
    for of in sets.values():
        before = os.getloadavg()[0]
        for job, times in zip(of, launch("time", of, steps, clock), strict=True):
            yield job, max(times), before


def write_results(out: Path, path: Path, there: Cluster, content: list[Entry], clock: Clock) -> None:
    """What has been measured so far; ``path``: the machine's file."""
    head = ["layout", "GB predicted", "measured", "error", "step s predicted", "measured", "error", "errors by round"]
    lines = [
        f"{facts()}. Speeds from m2 plan --measure alone ([the last round's]({path.name})), in which a process takes "
        f"{there.reserve_gb:.2f} GB beside what is counted. Of the worst rank; errors are predicted / measured - 1, of "
        "times the median of the rounds', beside medians of both." + CPU_SECONDS * (clock == "cpu"),
        "",
        *table(head, [row(entry) for entry in content]),
        "",
        summary(content, "memory", MEMORY_GOAL),
        "",
        summary(content, "times", TIME_GOAL),
    ]
    text = "\n".join(["# Predicted and measured: memory and step time", "", *lines]) + "\n"
    publish(out, {"machine": facts(), "layouts": content}, text)


def row(entry: Entry) -> list[str]:
    cells = [entry["name"], "-", "-", "-", "-", "-", "-", "-"]
    if "memory" in entry:
        cells[1:4] = [*(f"{entry['memory'][side] / 1e9:.2f}" for side in SIDES), f"{error(entry, 'memory'):+.0%}"]
    if entry.get("times"):
        medians = [statistics.median(found[side] for found in entry["times"]) for side in SIDES]
        each = ", ".join(f"{x:+.0%}" for x in errors(entry["times"]))
        cells[4:] = [*(f"{x:.3f}" for x in medians), f"{error(entry, 'times'):+.0%}", each]
    return cells


def errors(found: list[dict[str, Any]]) -> list[float]:
    return [x["predicted"] / x["measured"] - 1 for x in found]


def error(entry: Entry, what: str) -> float:
    return errors([entry["memory"]])[0] if what == "memory" else statistics.median(errors(entry["times"]))


def summary(content: Iterable[Entry], what: str, goal: float) -> str:
    name = {"memory": "Memory", "times": "Step time"}[what]
    found = {entry["name"]: error(entry, what) for entry in content if entry.get(what)}
    if not found:
        return f"{name}: not measured."
    worst = max(found, key=lambda job: abs(found[job]))
    within = sum(abs(x) <= goal for x in found.values())
    return f"{name}: {within} of {len(found)} within {goal:.0%}; the worst is {worst} ({found[worst]:+.0%})."


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
