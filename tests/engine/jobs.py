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
from m2_ds.parallel.mesh import Mesh

# Of a log line, what two runs of the same settings must agree on; the rest is time and memory.
EXACT = ("step", "samples", "loss", "lr", "grad_norm", "logit_scale", "skipped")


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

    def call(self: ContrastiveStep, batch: Any) -> Any:
        nonlocal done
        if done == steps:
            raise Interrupted
        done += 1
        return original(self, batch)

    ContrastiveStep.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        ContrastiveStep.__call__ = original  # type: ignore[method-assign]


def interrupt_and_go_on(mesh: Mesh, trees: Sequence[dict[str, Any]], steps: int) -> list[list[str | None]]:
    """Each run once with an end after ``steps`` steps, then again to its own end; the errors of both parts."""
    found = []
    for tree in trees:
        with stopped_after(steps):
            first = attempt(mesh, tree)
        found.append([first, attempt(mesh, tree)])
    return found


def same(a: Any, b: Any, where: str = "") -> str | None:
    """None where two unpickled structures are equal to the bit, else the place of the first difference."""
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else f"{where}: tensors differ"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: other keys"
        return next((d for key in a if (d := same(a[key], b[key], f"{where}.{key}"))), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{where}: other lengths"
        return next((d for i, (x, y) in enumerate(zip(a, b)) if (d := same(x, y, f"{where}.{i}"))), None)
    if type(a).__eq__ is object.__eq__:  # DeepSpeed's own small objects
        return same(vars(a), vars(b), where) if hasattr(a, "__dict__") else None
    return None if a == b else f"{where}: {a!r} and {b!r}"


def compare_checkpoints(one: Path, other: Path) -> None:
    """Weights and DeepSpeed's state (optimizer, schedule) are the same to the bit."""
    mine, yours = read_weights(one / "model"), read_weights(other / "model")
    assert (difference := same(mine, yours)) is None, difference
    files = sorted(path.relative_to(one) for path in (one / "engine").rglob("*.pt"))
    assert files and files == sorted(path.relative_to(other) for path in (other / "engine").rglob("*.pt"))
    for file in files:
        loaded = [torch.load(folder / file, weights_only=False) for folder in (one, other)]
        for content in loaded:
            # ZeRO-3 leaves the padding behind a partition as it finds it; the weights themselves were compared above.
            content.get("optimizer_state_dict", {}).pop("fp32_flat_groups", None)
        assert (difference := same(*loaded, str(file))) is None, difference


def train_all(mesh: Mesh, trees: Sequence[dict[str, Any]]) -> list[str | None]:
    """Carry out runs one after another; the error of each, as text."""
    return [attempt(mesh, tree) for tree in trees]


def attempt(mesh: Mesh, tree: dict[str, Any]) -> str | None:
    from m2_ds.train import run

    try:
        run(config_of(tree), mesh)
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
