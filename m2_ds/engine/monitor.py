"""What a run says while it trains: JSON lines, TensorBoard, Weights & Biases if asked, a progress bar."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from m2_ds.config import RunConfig
from m2_ds.data.batch import PairBatch
from m2_ds.data.pairs import PairDataset
from m2_ds.engine.anomalies import NOT_FINITE, Records, Watch, finite, not_finite
from m2_ds.engine.flops import StepFlops, peak_tflops
from m2_ds.engine.masked import OBJECTIVES, summarise
from m2_ds.engine.optim import lr_scale
from m2_ds.engine.passes import PHASES
from m2_ds.engine.step import ContrastiveStep, StepResult
from m2_ds.engine.tolerance import Board, Forgiving
from m2_ds.files import Lines, write_atomically, write_json
from m2_ds.parallel.collectives import all_gather_objects, all_reduce_sum
from m2_ds.parallel.mesh import Mesh

log = logging.getLogger(__name__)


class Monitor:
    """Collects results on the device and reads them once every ``log.every`` steps. A context manager.

    Every rank holds one; only the first writes.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        step: ContrastiveStep,
        languages: list[str],
        start_step: int,
        start_samples: int,
        stream: PairDataset | None,
        records: Records,
        watch: Watch,
    ) -> None:
        """``start_samples``: pairs that the run has seen before this job; ``stream``: on the first rank."""
        self.config, self.mesh, self.levels, self.languages = config, mesh, step.level_names, languages
        self.clock = step.clock
        self.flops = StepFlops(config.model)
        self.peak = config.log.peak_tflops or peak_tflops(mesh.device)
        self.sinks = _Sinks(config, start_step) if mesh.is_first else None
        self.records, self.watch = records, watch
        self.samples, self.stream = start_samples, stream
        before = self.sinks.before if self.sinks else {}
        self.skipped_in_all: Counter[str] = Counter(before.get("skipped", {}))
        self.other_language_in_all: int = before.get("other_language", 0)
        self._reset(time.perf_counter())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.sinks:
            self.sinks.close()

    def _reset(self, now: float) -> None:
        self.results: list[StepResult] = []
        self.steps = 0
        self.records.forget()
        self.skipped: Counter[str] = Counter()
        self.other_language = 0
        self.operations = 0.0
        self.waited = 0.0
        self.started = now
        self.clock.take()
        self.mesh.traffic.take()

    def add(
        self,
        step: int,
        batches: Sequence[PairBatch],
        result: StepResult,
        waited: float,
        samples: int,
        stop: bool = False,
        skipped: bool = False,
    ) -> None:
        """Take in the result of step number ``step`` (from 0); write a log line where one is due.

        ``samples``: pairs that the run has seen behind it. The loss of a ``skipped`` update is in no mean.

        One is due at every checkpoint, too (that of a job told to ``stop`` included): a run that goes on from there
        has lines over the same steps as one that was never interrupted, and a checkpoint is only written after finite
        numbers.
        """
        self.samples, self.last = samples, result
        self.steps += 1
        if not skipped:
            self.results.append(result)
        for batch in batches:
            captions, pairs, length = batch.ids.shape
            self.skipped.update(batch.skipped)
            self.other_language += batch.other_language
            self.operations += self.flops(pairs, captions * pairs, length)
            if self.config.loss.masked:
                self.operations += captions * pairs * self.flops.joint(length, self.config.loss.cmlm.share)
        self.waited += waited
        if stop or (step + 1) % self.config.log.every == 0 or self.config.checkpoint_due(step + 1):
            self._reset(self._write(step + 1))

    def pause(self, seconds: float) -> None:
        """Leave out time that evaluation or a checkpoint took."""
        self.started += seconds

    def _write(self, done: int) -> float:
        """Write the numbers of the steps since the last time; returns the clock at their end."""
        n, group, kept = self.steps, self.mesh.data_parallel, len(self.results)
        none = torch.zeros(len(self.last.loss) + 1, len(self.last.count), device=self.last.count.device)
        sums = torch.stack([none, *(torch.cat([r.loss, r.count[None]]) for r in self.results)]).sum(0)
        sent, held_up = self.mesh.traffic.take()
        sums = all_reduce_sum(sums, group, "log").cpu()  # waits for the device: the time below is the steps' own
        of_masked, masked = summarise([r.masked for r in self.results if r.masked], self.languages, group)
        now = time.perf_counter()
        phases = self.clock.take()
        seconds = now - self.started
        loss, count = sums[:-1], sums[-1]
        last = self.last
        # Model-parallel ranks read the same pairs, and share the arithmetic of them.
        mesh = self.mesh
        alone = mesh.tensor.is_first and mesh.pipeline.is_first
        skipped, other = (dict(self.skipped), self.other_language) if alone else ({}, 0)
        own = (skipped, other, _memory_gb(mesh.device), _bubble(phases))
        everyone = all_gather_objects(own, mesh.world)
        tflops = self.operations / (mesh.tensor.size * mesh.pipeline.size) / seconds / 1e12
        norms = [float(r.grad_norm) for r in self.results if r.grad_norm is not None]
        by_level = loss.sum(1) / count.sum()  # NaN, and null in the log, where no update was kept
        weights = [w for w in (self.config.loss.unimodal_weight, self.config.loss.vl_weight) if w > 0]
        numbers: dict[str, Any] = {
            "step": done,
            "samples": self.samples,
            "time": round(time.time(), 3),
            "loss": sum(w * float(x) for w, x in zip(weights, by_level)),
            **{f"loss/{name}": float(x) for name, x in zip(self.levels, by_level)},
            **{f"loss/{lang}": float(x) for lang, x in zip(self.languages, loss.mean(0) / count)},
            "lr": self.config.optim.lr * lr_scale(done - 1, self.config.steps, self.config.optim.schedule),
            "grad_norm": sum(norms) / len(norms) if norms else None,
            **{f"logit_scale/{name}": float(x) for name, x in zip(self.levels, last.scales)},
            "samples_per_s": n * self.config.global_batch / seconds,
            "step_s": seconds / n,
            "data_wait_s": self.waited / n,
            "data_wait_share": self.waited / seconds,
            "tflops": tflops,
            "mfu": tflops / self.peak if self.peak else None,
            "memory_gb": max(memory for _, _, memory, _ in everyone),
            "contrastive_batch": int(last.contrastive_batch),
            "repeated_share": sum(float(r.repeated) for r in self.results)
            * group.size
            / (max(kept, 1) * self.config.global_batch),
            **{f"seconds/{phase}": phases.get(phase, 0.0) / n for phase in PHASES},
            **{f"sent_mb/{kind}": x / n / 1e6 for kind, x in sorted(sent.items()) if x and kind != "log"},
            "communication_share": sum(held_up.values()) / seconds,
        }
        if self.mesh.pipeline.size > 1:
            numbers["bubble_share"] = sum(bubble for *_, bubble in everyone) / len(everyone)
        for replaced, other, _, _ in everyone:
            self.skipped_in_all.update(replaced)
            self.other_language_in_all += other
        numbers["loss"] += of_masked
        numbers |= masked
        numbers["skipped"] = dict(self.skipped_in_all)
        numbers["other_language"] = self.other_language_in_all
        if self.config.anomalies.watched:
            numbers["updates_skipped"] = self.watch.skipped
        if self.stream is not None:
            numbers |= {f"epochs/{name}": x for name, x in self.stream.epochs(self.samples).items()}
        if self.sinks:
            self.sinks.write(numbers)
        # Steps that the watch let pass are looked at again: a loss may be off whose gradient is not.
        bad = [done - len(norms) + i + 1 for i, norm in enumerate(norms) if not finite(norm)] if kept == n else []
        if bad:
            self.records.write(bad[0], NOT_FINITE)
            raise not_finite(bad[0], NOT_FINITE, "")
        if kept and not math.isfinite(numbers["loss"]):
            raise FloatingPointError(
                f"the loss is {numbers['loss']} at step {done}: not finite. Lower optim.lr, lengthen "
                "optim.schedule.warmup_steps or set optim.grad_clip and start the job again: it goes on from the "
                "newest checkpoint"
            )
        return now

    def finish(self) -> None:
        """Say what the run has seen in all."""
        if self.sinks and self.stream is not None:
            epochs = {f"epochs/{name}": x for name, x in self.stream.epochs(self.samples).items()}
            self.sinks.say(f"done: {self.config.steps} steps, {self.samples} pairs, {_epochs(epochs)}")

    def write_evaluation(self, step: int, metrics: dict[str, float], path: Path) -> None:
        """To ``path``, and to the curves."""
        if self.sinks:
            with self.sinks.forgiving("evaluation file"):
                path.parent.mkdir(exist_ok=True)
                write_json(path, {"step": step, "metrics": metrics})
            self.sinks.scalars(step, {f"evaluation/{name}": value for name, value in metrics.items()})


class _Sinks:
    """Files, services and the terminal of the first rank."""

    def __init__(self, config: RunConfig, start_step: int) -> None:
        folder = config.folder
        path = folder / "log.jsonl"
        try:
            self.before = _forget_after(path, start_step)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error}. Look at free space and permissions there") from None
        self.file, self.forgiving = Lines(path), Forgiving()
        # Viewers hide points of earlier starts from this step on.
        self.board = Board(folder / "tensorboard", start_step + 1)
        self.wandb = _start_wandb(config) if config.log.wandb_project else None
        console = Console()
        self.live = console.is_terminal
        self.steps = config.steps
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.task = self.progress.add_task("", total=config.steps, completed=start_step)
        self.progress.start()

    def write(self, numbers: dict[str, Any]) -> None:
        # JSON has no NaN.
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        with self.forgiving("log line"):
            self.file.append(json.dumps(entry, ensure_ascii=False))
        self.scalars(numbers["step"], {k: v for k, v in numbers.items() if isinstance(v, int | float)})
        if numbers["skipped"]:
            self.scalars(numbers["step"], {f"skipped/{k}": v for k, v in numbers["skipped"].items()})
        line = _line(numbers)
        self.progress.update(self.task, completed=numbers["step"], description=line)
        if not self.live:
            with self.forgiving("line of output"):
                print(f"step {numbers['step']}/{self.steps}  {line}", flush=True)

    def say(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, soft_wrap=True) if self.live else print(line, flush=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self.forgiving("point of the curves"):
            self.board.add(step, {k: v for k, v in values.items() if k not in ("step", "samples", "time")})
        if self.wandb:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        self.progress.stop()
        self.file.close()
        with self.forgiving("end of the curves"):
            self.board.close()
        self.forgiving.end()
        if self.wandb:
            self.wandb.finish()


def _bubble(phases: dict[str, float]) -> float:
    """The share of the passes of a pipeline in which this rank waited for its neighbours."""
    busy = sum(phases.get(phase, 0.0) for phase in ("forward", "recompute", "backward"))
    return phases.get("pipe", 0.0) / max(busy + phases.get("pipe", 0.0), 1e-9)


def _line(numbers: dict[str, Any]) -> str:
    parts = [f"loss {numbers['loss']:.3f}"]
    parts += [
        f"{name.removeprefix('loss/')} {numbers[name]:.3f}" for name in numbers if name in _language_names(numbers)
    ]
    parts += [f"{numbers['samples_per_s']:.0f} samples/s", f"wait {100 * numbers['data_wait_share']:.1f}%"]
    parts += [
        f"{numbers['tflops'] * 1000:.0f} GFLOP/s" if numbers["tflops"] < 1 else f"{numbers['tflops']:.1f} TFLOP/s"
    ]
    accuracy = [f"{100 * x:.0f}" for name, x in numbers.items() if name.startswith("cmlm_accuracy/") and x is not None]
    if accuracy:
        parts.append(f"words {' '.join(accuracy)}%")
    if "cmim_error" in numbers:
        parts.append(f"patches {numbers['cmim_error']:.2f}")
    if numbers["mfu"]:
        parts.append(f"MFU {100 * numbers['mfu']:.0f}%")
    scale = next(value for name, value in reversed(numbers.items()) if name.startswith("logit_scale/"))
    if numbers["grad_norm"] is not None:
        parts.append(f"norm {numbers['grad_norm']:.2f}")
    if "bubble_share" in numbers:
        parts.append(f"bubble {100 * numbers['bubble_share']:.0f}%")
    if any(name.startswith("sent_mb/") for name in numbers):
        parts.append(f"comm {100 * numbers['communication_share']:.0f}%")
    parts += [f"scale {scale:.1f}", f"{numbers['memory_gb']:.1f} GB"]
    if epochs := {name: x for name, x in numbers.items() if name.startswith("epochs/")}:
        parts.append(_epochs(epochs))
    if numbers["other_language"]:
        parts.append(f"other language {numbers['other_language']}")
    if numbers.get("updates_skipped"):
        parts.append(f"updates skipped {numbers['updates_skipped']}")
    if numbers["skipped"]:
        parts.append("skipped " + ", ".join(f"{v} {k}" for k, v in numbers["skipped"].items()))
    return "  ".join(parts)


def _epochs(numbers: dict[str, float]) -> str:
    """'epochs emoji 3.27, scenes 0.51' from the fields of a log line."""
    return "epochs " + ", ".join(f"{name.removeprefix('epochs/')} {x:.2f}" for name, x in numbers.items())


def _language_names(numbers: dict[str, Any]) -> list[str]:
    others = ("loss/unimodal", "loss/vl", *(f"loss/{name}" for name in OBJECTIVES))
    return [n for n in numbers if n.startswith("loss/") and n not in others]


def _forget_after(path: Path, step: int) -> dict[str, Any]:
    """Drop lines past the step a run goes on from: they will be written again. A line cut short by a crash goes, too.

    Returns the last line that is left: some of its numbers count from the beginning of the run.
    """
    kept: list[str] = []
    last: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            if entry["step"] <= step:
                kept.append(line + "\n")
                last = entry
        except (json.JSONDecodeError, KeyError, TypeError):
            log.warning("%s: a line that is not a log entry was dropped: %.60r", path, line)
    write_atomically(path, "".join(kept).encode())
    return last


def _start_wandb(config: RunConfig) -> Any:
    import wandb

    return wandb.init(project=config.log.wandb_project, name=config.folder.name, config=config.model_dump(mode="json"))


def _memory_gb(device: torch.device) -> float:
    """Peak allocated memory of a GPU; resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
