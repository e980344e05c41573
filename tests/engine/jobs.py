"""What runs on the ranks of the engine tests: jobs, several in one set of processes (starting one takes 5 s)."""

import contextlib
import copy
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2_ds.config import RunConfig
from m2_ds.convert.canonical import read_weights
from m2_ds.parallel.config import ParallelConfig
from m2_ds.parallel.mesh import Mesh

# Of a log line, what two runs of the same settings must agree on; the rest is time and memory.
EXACT = ("step", "samples", "loss", "lr", "grad_norm", "logit_scale", "skipped", "other_language", "epochs")


def changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a recipe with dotted fields set: ``{"optim.lr": 1e-3}``."""
    tree = copy.deepcopy(tree)
    for name, value in changes.items():
        *parents, last = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def config_of(tree: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(tree)


class Interrupted(Exception):
    """Stands for whatever ends a job between two steps."""


@contextlib.contextmanager
def stopped_after(steps: int | None) -> Iterator[None]:
    """The job ends after this many of its own steps; None: it does not."""
    from m2_ds.engine.step import ContrastiveStep

    original, done = ContrastiveStep.__call__, 0

    def call(self: ContrastiveStep, *arguments: Any) -> Any:
        nonlocal done
        if done == steps:
            raise Interrupted
        done += 1
        return original(self, *arguments)

    ContrastiveStep.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        ContrastiveStep.__call__ = original  # type: ignore[method-assign]


def train_for(mesh: Mesh, trees: Sequence[dict[str, Any]], steps: int | None) -> list[str | None]:
    """Each run with an end after ``steps`` of its own steps."""
    found = []
    for tree in trees:
        with stopped_after(steps):
            found.append(attempt(mesh, tree))
    return found


def interrupt_and_go_on(mesh: Mesh, trees: Sequence[dict[str, Any]], steps: int) -> list[list[str | None]]:
    """Each run once with an end after ``steps`` steps, then again to its own end; the errors of both parts."""
    found = []
    for tree in trees:
        with stopped_after(steps):
            first = attempt(mesh, tree)
        found.append([first, attempt(mesh, tree)])
    return found


def same(mine: dict[str, Tensor], yours: dict[str, Tensor]) -> str | None:
    """None where tensors are equal to the bit, else the name of the first that differs."""
    if mine.keys() != yours.keys():
        return f"other names: {sorted(mine.keys() ^ yours.keys())}"
    return next((n for n, x in mine.items() if x.dtype != yours[n].dtype or not torch.equal(x, yours[n])), None)


def parts(checkpoint: Path) -> list[str]:
    """The weights and every kind of optimizer state."""
    return ["model", *sorted(f"optimizer/{path.name}" for path in (checkpoint / "optimizer").iterdir())]


def compare_checkpoints(one: Path, other: Path) -> None:
    """Weights, optimizer state and its step are the same to the bit."""
    assert parts(one) == parts(other) and len(parts(one)) > 1
    for part in parts(one):
        assert (name := same(read_weights(one / part), read_weights(other / part))) is None, f"{part}: {name}"
    mine, yours = (json.loads((folder / "state.json").read_text()) for folder in (one, other))
    assert {**mine, "layout": None} == {**yours, "layout": None}


def write_again(mesh: Mesh, trees: Sequence[dict[str, Any]]) -> list[str | None]:
    """Each run restored from its newest checkpoint, which it writes anew at once: nothing is trained in between."""
    from m2_ds.data.pairs import PairDataset
    from m2_ds.engine import checkpoint
    from m2_ds.engine.trainer import Trainer

    def save(trainer: Trainer, start: int, samples: int, found: Path | None) -> None:
        stream = PairDataset(trainer.config.data, trainer.tokenizer, trainer.config.seed).state(samples)
        given = (trainer.engine, trainer.model, start, trainer.config, trainer.tokenizer, trainer.mesh, stream)
        checkpoint.write(checkpoint.Content.now(*given), trainer.mesh)

    original = Trainer.run
    Trainer.run = save  # type: ignore[method-assign]
    try:
        return train_all(mesh, trees)
    finally:
        Trainer.run = original  # type: ignore[method-assign]


def train_all(mesh: Mesh, trees: Sequence[dict[str, Any]]) -> list[str | None]:
    """Carry out runs one after another; the error of each, as text."""
    return [attempt(mesh, tree) for tree in trees]


def attempt(mesh: Mesh, tree: dict[str, Any]) -> str | None:
    """One run, with its ranks laid out as it asks; the error as text."""
    from m2_ds.train import run

    config = config_of(tree)
    try:
        run(config, mesh if config.parallel == ParallelConfig() else mesh.with_layout(config.parallel))
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return None


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def exact_part(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k.split("/")[0] in EXACT} for line in lines]


def curve(folder: Path, field: str = "loss") -> Tensor:
    return torch.tensor([line[field] for line in log_lines(folder)], dtype=torch.float64)


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    return read_weights(folder / f"checkpoints/step-{step:08}/model")


def call_all(mesh: Mesh, calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """``function(mesh, *arguments)`` one after another in one set of processes."""
    return [function(mesh, *arguments) for function, arguments in calls]
