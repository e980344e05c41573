"""A run goes on in another layout: its checkpoint is the same to the bit, its curve that of one that never stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import m2_ds
from m2_ds.convert.canonical import read_weights
from m2_ds.model.encoder import canonical_shapes
from tests.engine.jobs import (
    changed,
    compare_checkpoints,
    config_of,
    curve,
    parts,
    train_all,
    train_for,
    write_again,
)
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.timeout(900), pytest.mark.distributed]
RANKS, STEPS, EVERY = 4, 14, 4
# (tensor, pipeline, DeepSpeed file); what is left of the ranks is data-parallel
DENSE, CUT = (1, 1, "zero1"), (2, 2, "zero1")
# Uncut layouts come first in a set of processes: DeepSpeed remembers the last tensor-parallel one.
CHAINS = {
    "zero 1, 3, 2": [DENSE, (1, 1, "zero3"), (2, 1, "zero2")],
    "cut, dense, cut": [CUT, DENSE, CUT],
}
OTHERS = [(1, 1, "zero0"), (1, 1, "zero3_offload"), (2, 1, "zero3"), (2, 1, "zero2"), (2, 1, "zero2_offload"), CUT]


def job(tree: dict[str, Any], files: dict[str, Path], folder: Path, layout: tuple[int, int, str]) -> dict[str, Any]:
    tensor, pipeline, file = layout
    changes = {
        "folder": str(folder),
        "parallel": {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline},
        "engine.deepspeed": str(files[file]),
    }
    return changed(tree, changes)


@pytest.fixture(scope="module")
def tree(recipe: dict[str, Any]) -> dict[str, Any]:
    """A vocabulary that two ranks cannot share evenly, and more micro-batches where fewer ranks are data-parallel."""
    checkpoints = {"every": EVERY, "keep": 9}
    return changed(recipe, {"steps": STEPS, "micro_batch": 4, "model.vocab_size": 601, "checkpoint": checkpoints})


@pytest.fixture(scope="module")
def runs(tree: dict[str, Any], deepspeed_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/ of each chain, whose layout changes after every checkpoint, "straight" and "bf16", which keep DENSE."""
    folder = tmp_path_factory.mktemp("layouts")
    trees = [job(tree, deepspeed_files, folder / "straight", DENSE)]
    trees.append(
        changed(job(tree, deepspeed_files, folder / "bf16", DENSE), {"steps": EVERY, "engine.precision": "bf16"})
    )
    for results in run_ranks(RANKS, train_all, trees, seconds=300):
        assert results == [None, None], results
    for part in range(3):
        trees = [job(tree, deepspeed_files, folder / name, layouts[part]) for name, layouts in CHAINS.items()]
        for errors in run_ranks(RANKS, train_for, trees, EVERY if part < 2 else None, seconds=300):
            assert all("Interrupted" in error if part < 2 else error is None for error in errors), errors
    return folder


@pytest.mark.parametrize("name", CHAINS)
def test_the_curve_is_that_of_a_run_that_kept_its_layout(runs: Path, name: str) -> None:
    for field in ("loss", "grad_norm"):
        found, wanted = curve(runs / name, field), curve(runs / "straight", field)
        assert len(found) == STEPS
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("step", [4, 8, 12, 14])
def test_weights_and_moments_are_whole_whatever_layout_wrote_them(runs: Path, name: str, step: int) -> None:
    mine, yours = (runs / run / f"checkpoints/step-{step:08}" for run in (name, "straight"))
    assert parts(mine) == parts(yours)
    for part in parts(mine):
        found, wanted = read_weights(mine / part), read_weights(yours / part)
        assert found.keys() == wanted.keys()
        for weight, value in wanted.items():
            scale = value.abs().max().clamp(min=1e-3 if part == "model" else 1e-6).item()
            torch.testing.assert_close(found[weight], value, rtol=0, atol=5e-4 * scale, msg=f"{part}: {weight}")


def test_every_stage_writes_its_own_files(runs: Path, tree: dict[str, Any]) -> None:
    checkpoint = runs / "cut, dense, cut/checkpoints/step-00000004"
    assert json.loads((checkpoint / "state.json").read_text())["layout"]["pipeline_parallel"] == 2
    shapes = canonical_shapes(config_of(tree).model)
    for part in parts(checkpoint):
        files = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
        assert sorted(path.name for path in (checkpoint / part).glob("*.safetensors")) == files
        index = json.loads((checkpoint / part / "model.safetensors.index.json").read_text())
        found = read_weights(checkpoint / part)
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(x.numel() * 4 for x in found.values())
        assert all(tuple(x.shape) == shapes[name] and x.dtype == torch.float32 for name, x in found.items())
    assert read_weights(checkpoint / "model").keys() == shapes.keys()
    model, _ = m2_ds.load(checkpoint)
    assert model.backbone.text_embed.weight.shape[0] == 601


@pytest.mark.slow
@pytest.mark.parametrize("source", ["straight", "bf16"])
def test_what_another_layout_writes_anew_is_the_same_to_the_bit(
    runs: Path, tree: dict[str, Any], deepspeed_files: dict[str, Path], tmp_path: Path, source: str
) -> None:
    precision, trees = "bf16" if source == "bf16" else "fp32", []
    name = f"checkpoints/step-{EVERY:08}"
    for number, layout in enumerate(OTHERS):
        folder = tmp_path / str(number)
        shutil.copytree(runs / source / name, folder / name)
        trees.append(changed(job(tree, deepspeed_files, folder, layout), {"engine.precision": precision}))
    for errors in run_ranks(RANKS, write_again, trees, seconds=300):
        assert errors == [None] * len(OTHERS), errors
    for number in range(len(OTHERS)):
        compare_checkpoints(tmp_path / str(number) / name, runs / source / name)
