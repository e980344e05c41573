"""Runs that start from released weights: adapters against a plain loop, resuming, frozen weights, resolution."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import m2_ds
from m2_ds.config import RunConfig
from m2_ds.convert.canonical import read_weights
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.lora import merge_adapter
from m2_ds.model.weights import init_weights
from m2_ds.parallel.mesh import Mesh
from tests.engine.jobs import (
    changed,
    compare_checkpoints,
    config_of,
    curve,
    exact_part,
    interrupt_and_go_on,
    log_lines,
    same,
    train_all,
    weights,
)
from tests.engine.test_exact import Plain, distance
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)  # the first test waits for all runs
RANK, ALPHA = 4, 6.0
LORA = {"rank": RANK, "alpha": ALPHA, "pattern": r"\.(q|k|v)_proj\.|ffn\.[AB]\.fc1$|^itc_vl_text"}
LORA_RULES = [
    {"pattern": r"^logit_|^itc_vl_image|final_layer_norm\.A", "freeze": False},
    {"pattern": r"\.B\.", "lr_scale": 0.5},
]
# What the runs are told by: a ZeRO stage, "in parts": 4 micro-batches, "tensor", "pipeline": two ranks of that kind.
# ZeRO 3 comes last, for it replaces torch's linear layer for good; and tensor-parallel ranks after plain ones, to which
# DeepSpeed does not go back in one process.
LORA_CASES = ("zero0", "zero2 in parts", "zero3-bf16")
FROZEN_CASES = ("frozen zero2-bf16", "frozen zero1-bf16 tensor", "frozen zero3-bf16")
GENTLE_CASES = ("gentle zero2-bf16",)
SLOW_LORA_CASES = ("zero1-bf16", "zero3 in parts")
SLOW_FROZEN_CASES = ("frozen zero1", "frozen zero0-bf16", "frozen zero1-bf16 pipeline")
SLOW_GENTLE_CASES = ("gentle zero0-bf16", "gentle zero3-bf16")
USUAL = (*GENTLE_CASES, *LORA_CASES, *FROZEN_CASES)
SLOW = (*SLOW_GENTLE_CASES, *SLOW_LORA_CASES, *SLOW_FROZEN_CASES)
IMAGE_TOWER = r"^backbone\.(vision_embed|encoder\.(layers\.\d+\..*|layer_norm|embed_positions)\.A\.)"
NEW_SIZE = 48  # pixels; the released file is of 32: 6 x 6 patches from 4 x 4


def base_model(config: RunConfig) -> M2Encoder:
    model = M2Encoder(config.model)
    init_weights(model, config.model, config.seed)
    return model


@pytest.fixture(scope="module")
def base(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release file of fp32 numbers."""
    path = tmp_path_factory.mktemp("release") / "base.ckpt"
    torch.save({"state_dict": base_model(config_of(recipe)).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def mixed(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release file as DeepSpeed leaves it: matrices in fp16, the rest in fp32."""
    path = tmp_path_factory.mktemp("release") / "mixed.ckpt"
    state = base_model(config_of(recipe)).state_dict()
    state = {f"_forward_module.{n}": x.half() if x.dim() > 1 else x * 1.001 for n, x in state.items()}
    torch.save({"module": state}, path)
    return path


def lora_tree(recipe: dict[str, Any], files: dict[str, Path], base: Path, folder: Path, name: str) -> dict[str, Any]:
    return changed(
        recipe,
        {
            "folder": str(folder),
            "init_from": str(base),
            "lora": LORA,
            "optim.rules": LORA_RULES,
            "optim.layer_decay": 0.8,
            "optim.lr": 1e-2,
            "engine.deepspeed": str(files[stage_of(name)]),
            "engine.precision": "bf16" if "bf16" in name else "fp32",
            "micro_batch": 2 if "parts" in name else None,
            "checkpoint.every": 4,
        },
    )


def frozen_tree(recipe: dict[str, Any], files: dict[str, Path], mixed: Path, folder: Path, name: str) -> dict[str, Any]:
    """Four steps with the image tower locked, at another resolution; or three gentle ones."""
    return changed(
        recipe,
        {
            "folder": str(folder),
            "steps": 4,
            "init_from": str(mixed),
            "model.image_size": NEW_SIZE,
            "optim.rules": [{"pattern": IMAGE_TOWER, "freeze": True}],
            "engine.deepspeed": str(files[stage_of(name)]),
            "engine.precision": "bf16" if "bf16" in name else "fp32",
            "parallel.tensor_parallel_size": 2 if "tensor" in name else 1,
            "parallel.pipeline_parallel_size": 2 if "pipeline" in name else 1,
            "checkpoint.every": 2,
            "log.every": 2,
            **({"optim.lr": 1e-12, "optim.weight_decay": 0.0, "steps": 3} if "gentle" in name else {}),
        },
    )


def stage_of(name: str) -> str:
    return next(word for word in name.replace("-", " ").split() if word.startswith("zero"))


def job(mesh: Mesh, jobs: list[tuple[list[dict[str, Any]], int | None]]) -> list[str | None]:
    """Runs to be carried out as they are, and then, with a number of steps, the last one once more, interrupted."""
    found: list[str | None] = []
    for trees, steps in jobs:
        found += train_all(mesh, trees if steps is None else trees[:-1])
        if steps is not None:
            [[first, second]] = interrupt_and_go_on(mesh, trees[-1:], steps)
            found += [None if first and first.startswith("Interrupted") else f"was not interrupted: {first}", second]
    return found


Runs = Callable[[str], Path]


@pytest.fixture(scope="module")
def runs(
    recipe: dict[str, Any],
    deepspeed_files: dict[str, Path],
    base: Path,
    mixed: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """The folder of a run on two ranks; of the adapted ones, with straight/ and stopped/ in it."""
    folder, files = tmp_path_factory.mktemp("finetune"), deepspeed_files

    def job_of(name: str) -> tuple[list[dict[str, Any]], int | None]:
        if name in GENTLE_CASES + SLOW_GENTLE_CASES:
            return [frozen_tree(recipe, files, mixed, folder / name, name)], None
        if name in FROZEN_CASES + SLOW_FROZEN_CASES:
            return [frozen_tree(recipe, files, mixed, folder / name, name)], 3
        return [lora_tree(recipe, files, base, folder / name / kind, name) for kind in ("straight", "stopped")], 6

    @cache
    def errors(names: tuple[str, ...]) -> list[str]:
        found: list[str] = []
        for last in (False, True):
            jobs = [job_of(name) for name in names if (stage_of(name) == "zero3") == last]
            found += [error for of_rank in run_ranks(2, job, jobs, seconds=280) for error in of_rank if error]
        return found

    def of(name: str) -> Path:
        assert not (found := errors(SLOW if name in SLOW else USUAL)), "\n".join(found)
        return folder / name

    return of


def cases(*names: str) -> Any:
    return pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in names])


# -- adapters ---------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A weight as W + (alpha / rank) B A, by the definition."""

    def __init__(self, weight: Tensor, name: str, seed: int) -> None:
        super().__init__()
        import zlib

        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}.lora_A.weight".encode()))
        bound = weight.shape[1] ** -0.5
        self.a = nn.Parameter(torch.empty(RANK, weight.shape[1]).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ALPHA / RANK * self.b @ self.a


class PlainLora(Plain):
    """The same run in one process, by the definitions."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.names = [
            name
            for name, module in self.model.named_modules()
            if re.search(r"qkv_proj\.[AB]$|ffn\.[AB]\.fc1$|^itc_vl_text_proj\.fc$", name)
            and not (name.startswith("backbone_vl") and ".B" in name)
        ]
        for name in self.names:
            module = self.model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            parametrize.register_parametrization(module, "weight", Adapted(module.weight, name, config.seed))

    def groups(self) -> list[dict[str, Any]]:
        optim, groups = self.config.optim, []
        for name, weight in self.model.named_parameters():
            adapter = name.endswith((".0.a", ".0.b"))
            if not adapter and not re.search(r"^logit_|^itc_vl_image|^backbone.*final_layer_norm\.A", name):
                weight.requires_grad_(False)
                continue
            # Two backbone layers and one above them: 0.8 a layer down from the heads.
            below = {"backbone.encoder.layers.0": 3, "backbone.encoder.layers.1": 2, "backbone_vl.layers.0": 1}
            lr = 0.8 ** next((n for start, n in below.items() if name.startswith(start)), 0)
            lr *= 0.5 if ".B." in name else 1.0
            decay = optim.weight_decay if weight.dim() >= 2 else 0.0
            groups.append({"params": [weight], "base": lr * optim.lr, "lr": 0.0, "weight_decay": decay})
        return groups

    def merged(self) -> dict[str, Tensor]:
        for name in self.names:
            parametrize.remove_parametrizations(self.model.get_submodule(name), "weight")
        return dict(self.model.state_dict())


@pytest.fixture(scope="module")
def plain(recipe: dict[str, Any], deepspeed_files: dict[str, Path], base: Path, tmp_path_factory: Any) -> Any:
    tree = lora_tree(recipe, deepspeed_files, base, tmp_path_factory.mktemp("x"), "zero0")
    run = PlainLora(config_of(tree)).train()
    return run, run.merged()


@pytest.mark.distributed
@cases(*(name for name in LORA_CASES + SLOW_LORA_CASES if "bf16" not in name))
def test_adapters_train_like_the_plain_loop(runs: Runs, plain: Any, name: str) -> None:
    run, merged = plain
    folder = runs(name) / "straight"
    loss, norm = curve(folder), curve(folder, "grad_norm")
    torch.testing.assert_close(loss, torch.tensor(run.loss, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm, torch.tensor(run.norm, dtype=torch.float64), rtol=2e-5, atol=0)
    assert (norm > 0.5).all(), "clipping was not active"
    assert loss[-1] < loss[0] - 0.3
    assert distance(weights(folder, 8), merged) < 1e-4


@pytest.mark.distributed
@cases(*(name for name in LORA_CASES + SLOW_LORA_CASES if "bf16" in name))
def test_adapters_train_in_bf16(runs: Runs, name: str) -> None:
    loss, wanted = curve(runs(name) / "straight"), curve(runs("zero0") / "straight")
    torch.testing.assert_close(loss, wanted, rtol=0.03, atol=0)


@pytest.mark.distributed
@cases(*LORA_CASES, *SLOW_LORA_CASES)
def test_an_interrupted_adapted_run_ends_as_an_uninterrupted_one(runs: Runs, name: str) -> None:
    straight, stopped = (runs(name) / kind for kind in ("straight", "stopped"))
    mine, yours = (folder / "checkpoints/step-00000008" for folder in (stopped, straight))
    compare_checkpoints(mine, yours)
    for file in ("adapter_model.safetensors", "trained.safetensors"):
        assert same(load_file(mine / "adapter" / file), load_file(yours / "adapter" / file)) is None
    assert (mine / "adapter/adapter_config.json").read_bytes() == (yours / "adapter/adapter_config.json").read_bytes()
    assert exact_part(log_lines(stopped)) == exact_part(log_lines(straight))


@pytest.mark.distributed
@cases("zero0", "zero1-bf16", "zero3-bf16")
def test_a_checkpoint_of_adapters(runs: Runs, base: Path, recipe: dict[str, Any], name: str) -> None:
    checkpoint = runs(name) / "straight/checkpoints/step-00000008"
    model, first = read_weights(checkpoint / "model"), dict(base_model(config_of(recipe)).state_dict())
    adapters, trained = (load_file(checkpoint / f"adapter/{x}.safetensors") for x in ("adapter_model", "trained"))
    assert all(x.dtype == torch.float32 for x in (*model.values(), *adapters.values(), *trained.values()))
    # Merged is what changed, by W + (alpha / rank) B A; all else is to the bit what the run was given.
    layers = {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in adapters}
    moved = {n for n in first if not torch.equal(first[n], model[n])}
    assert moved == set(trained) | {
        f"{part}.weight"
        for layer in layers
        for part in ([layer.replace("qkv", x) for x in "qkv"] if "qkv" in layer else [layer])
    }
    a, b = (adapters[f"base_model.model.backbone.encoder.layers.1.ffn.B.fc1.lora_{x}.weight"] for x in "AB")
    wanted = first["backbone.encoder.layers.1.ffn.B.fc1.weight"] + ALPHA / RANK * b @ a
    torch.testing.assert_close(model["backbone.encoder.layers.1.ffn.B.fc1.weight"], wanted, rtol=0, atol=1e-6)
    assert b.any() and {"logit_vl_scale", "itc_vl_image_proj.fc.weight"} < set(trained)
    # Optimizer state is of the adapters and of what a rule un-froze, and of nothing else.
    names = set(read_weights(checkpoint / "optimizer/exp_avg"))
    assert names == {n.removeprefix("base_model.model.") for n in adapters} | set(trained)
    size = sum(f.stat().st_size for f in (checkpoint / "optimizer").rglob("*.safetensors"))
    assert size < 0.5 * (checkpoint / "model/model.safetensors").stat().st_size
    # Whoever has the released weights and the adapters has the model.
    tuned, _ = m2_ds.load(checkpoint)
    again = base_model(config_of(recipe))
    merge_adapter(again, checkpoint / "adapter")
    assert distance(dict(again.state_dict()), dict(tuned.state_dict())) < 1e-6


@pytest.mark.distributed
def test_a_run_of_adapters_wants_the_weights_that_it_adapts(
    runs: Runs,
    recipe: dict[str, Any],
    deepspeed_files: dict[str, Path],
    base: Path,
    mixed: Path,
    tmp_path: Path,
    solo: Mesh,
) -> None:
    def again(init_from: Path) -> list[str | None]:
        folder = shutil.copytree(runs("zero0") / "stopped", tmp_path / init_from.stem)
        shutil.rmtree(folder / "checkpoints/step-00000008")
        return train_all(solo, [lora_tree(recipe, deepspeed_files, init_from, folder, "zero0")])

    [told] = again(mixed)
    assert told and f"{mixed} does not hold the weights that" in told and f"read from {base}" in told
    assert "init_from=" in told and "step-00000004/model" in told
    [told] = again(tmp_path / "gone.ckpt")
    assert told and "gone.ckpt does not exist" in told and "needs the weights that it adapts" in told
    moved = Path(shutil.copy(base, tmp_path / "moved.ckpt"))
    assert again(moved) == [None]
    lines = exact_part(log_lines(tmp_path / "moved"))  # one rank instead of two: to rounding
    wanted = exact_part(log_lines(runs("zero0") / "straight"))
    assert [x["loss"] for x in lines] == pytest.approx([x["loss"] for x in wanted], rel=1e-5)


# -- frozen weights, another resolution -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(mixed: Path) -> dict[str, Tensor]:
    state = torch.load(mixed, weights_only=True)["module"]
    found = {name.removeprefix("_forward_module."): tensor.float() for name, tensor in state.items()}
    table = found["backbone.encoder.embed_positions.A.weight"]
    grid = F.interpolate(table[3:].T.reshape(1, -1, 4, 4), size=(6, 6), mode="area")[0].flatten(1).T
    # The file holds fp16, and so does its resized table.
    found["backbone.encoder.embed_positions.A.weight"] = torch.cat([table[:3], grid.half().float()])
    return found


@pytest.mark.distributed
@cases(*FROZEN_CASES, *SLOW_FROZEN_CASES)
def test_a_locked_tower_comes_out_as_it_went_in(runs: Runs, released: dict[str, Tensor], name: str) -> None:
    for step in (2, 4):
        found = weights(runs(name), step)
        assert found.keys() == released.keys()
        locked = {n for n in found if re.search(IMAGE_TOWER, n)}
        unreached = {n for n in found if re.search(r"^pooler|^norm|mask_token|^backbone_vl.*\.B\.", n)}
        assert len(locked) == 4 + 1 + 2 + 2 * 20  # embedding, positions, norm, layers
        assert same({n: found[n] for n in locked | unreached}, {n: released[n] for n in locked | unreached}) is None
        kept = {n for n in found if torch.equal(found[n], released[n])} - locked - unreached
        assert not kept, "these did not train"


@pytest.mark.distributed
@cases(*GENTLE_CASES, *SLOW_GENTLE_CASES)
def test_training_starts_from_the_numbers_of_the_file(runs: Runs, released: dict[str, Tensor], name: str) -> None:
    """In bf16, too: after steps of 1e-12 the masters are those of the file, which bf16 cannot hold."""
    found = weights(runs(name), 3)
    inexact = "backbone.encoder.layers.0.ffn.B.fc1.weight"
    assert (found[inexact].bfloat16().float() - found[inexact]).abs().max() > 1e-4
    for weight, tensor in released.items():
        torch.testing.assert_close(found[weight], tensor, rtol=0, atol=1e-9, msg=weight)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_pipeline_wants_something_to_train_in_its_first_stage(
    recipe: dict[str, Any], deepspeed_files: dict[str, Path], mixed: Path, tmp_path: Path
) -> None:
    tree = frozen_tree(recipe, deepspeed_files, mixed, tmp_path, "frozen zero1 pipeline")
    tree["optim"]["rules"] = [{"pattern": "^backbone", "freeze": True}]
    for [told] in run_ranks(2, train_all, [tree]):
        assert told and told.startswith("ValueError: optim.rules freeze all of a pipeline's first stage"), told


@pytest.mark.distributed
def test_a_model_of_another_resolution_is_whole(runs: Runs) -> None:
    folder = runs("frozen zero2-bf16")
    model, processor = m2_ds.load(folder)
    assert model.config.image_size == processor.image_size == NEW_SIZE
    images = torch.randint(0, 256, (2, 3, NEW_SIZE, NEW_SIZE)).to(torch.uint8)
    assert model.encode_image(images).shape == (2, 32)
    assert json.loads((folder / "checkpoints/step-00000004/model/config.json").read_text())["image_size"] == NEW_SIZE
