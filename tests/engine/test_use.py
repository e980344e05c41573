"""From Python: what m2_ds.load gives is what was trained, whichever part of the run folder it is pointed at."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import m2_ds
from m2_ds.convert.canonical import read_weights
from m2_ds.data.image import decode
from m2_ds.data.shards import open_dataset
from m2_ds.data.text import load_tokenizer
from m2_ds.engine.trainer import Trainer
from m2_ds.parallel.mesh import Mesh
from m2_ds.train import run
from tests.engine.conftest import TEST
from tests.engine.jobs import changed, config_of

TEXTS = ["a red circle", "白纸上的一个正方形，颜色是蓝色", "x"]
CASES = [("zero0", "fp32"), ("zero1", "fp32"), ("zero2_offload", "fp32"), ("zero0", "bf16"), ("zero1", "bf16")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def trained(
    request: pytest.FixtureRequest,
    solo: Mesh,
    recipe: dict[str, Any],
    deepspeed_files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, torch.nn.Module]:
    """A run folder and the module that was trained."""
    stage, precision = request.param
    folder = tmp_path_factory.mktemp("use") / "run"
    changes = {"engine.deepspeed": str(deepspeed_files[stage]), "engine.precision": precision, "checkpoint.every": 4}
    engines = []

    class Watched(Trainer):
        def __init__(self, engine: Any, *arguments: Any) -> None:
            super().__init__(engine, *arguments)
            engines.append(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2_ds.engine.trainer.Trainer", Watched)
        run(config_of(changed(recipe, {"folder": str(folder), **changes})), solo)
    return folder, engines[0].module.eval()


def embeddings(model: Any, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(ids, mask)


def test_loading_gives_the_trained_model(
    trained: tuple[Path, torch.nn.Module], shapes: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, module = trained
    pictures = [decode(record.image) for record in open_dataset(shapes).split("test").read(range(TEST))]
    canonical = shutil.copytree(folder / "checkpoints/step-00000008/model", tmp_path / "canonical")
    for path in (folder, folder / "checkpoints/step-00000008", canonical):
        model, processor = m2_ds.load(path, dtype=next(module.parameters()).dtype)
        images, (ids, mask) = processor.images(pictures), processor.texts(TEXTS)
        assert torch.equal(ids, load_tokenizer(tokenizer_folder, max_length=32).encode(TEXTS)[0])
        for found, wanted in zip(embeddings(model, images, ids, mask), embeddings(module, images, ids, mask)):
            assert torch.equal(found, wanted)
            torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
        assert torch.equal(model.logit_scale, module.logit_scale)
    older, _ = m2_ds.load(folder / "checkpoints/step-00000004", dtype=next(module.parameters()).dtype)
    assert not torch.equal(older.encode_image(images), embeddings(module, images, ids, mask)[0])


def test_weights_are_kept_in_fp32(trained: tuple[Path, torch.nn.Module]) -> None:
    assert {x.dtype for x in read_weights(trained[0] / "checkpoints/step-00000008/model").values()} == {torch.float32}


def test_a_run_can_start_from_the_weights_of_another(
    trained: tuple[Path, torch.nn.Module], solo: Mesh, recipe: dict[str, Any], tmp_path: Path
) -> None:
    for source in (trained[0], trained[0] / "checkpoints/step-00000008/model"):
        tree = changed(recipe, {"folder": str(tmp_path / source.name), "init_from": str(source), "steps": 3})
        run(config_of(changed(tree, {"optim.lr": 1e-12})), solo)
        found = read_weights(tmp_path / source.name / "checkpoints/step-00000003/model")
        for name, weight in read_weights(trained[0] / "checkpoints/step-00000008/model").items():
            torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-9)
    # The source is read at the start only: the run goes on without it.
    moved = changed(tree, {"init_from": str(tmp_path / "gone"), "steps": 5})
    run(config_of(moved), solo)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damage_is_found_at_loading(trained: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    copy = shutil.copytree(trained[0], tmp_path / "run")
    newest = copy / "checkpoints/step-00000008"
    # The optimizer's state is not read here, so damage to it does not matter.
    flip(newest / "optimizer/exp_avg/model.safetensors")
    assert same_weights(m2_ds.load(copy)[0], newest)
    flip(newest / "model/model.safetensors")
    assert same_weights(m2_ds.load(copy)[0], copy / "checkpoints/step-00000004")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        m2_ds.load(newest)
    flip(copy / "checkpoints/step-00000004/model/tokenizer.model")
    with pytest.raises(ValueError, match="without a good checkpoint"):
        m2_ds.load(copy)


def same_weights(model: Any, checkpoint: Path) -> bool:
    wanted = read_weights(checkpoint / "model")
    return all(torch.equal(weight, wanted[name]) for name, weight in model.state_dict().items())
