"""`m2 replay`: the same loss and norm as the step had, and the name of what is not finite."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_ds.engine import replay
from m2_ds.parallel.mesh import Mesh
from m2_ds.train import run
from tests.engine.jobs import changed, config_of, log_lines


@pytest.fixture(scope="module")
def folder(solo: Mesh, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints behind 2, 4, 6."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    run(config_of(changed(recipe, {"folder": str(folder), "steps": 6, "checkpoint": {"every": 2, "keep": 9}})), solo)
    return folder


def again(folder: Path, recipe: dict[str, Any], solo: Mesh, step: int, size: int = 4) -> replay.Replayed:
    return replay.again(config_of(changed(recipe, {"folder": str(folder), "steps": 6})), step, solo, size)


@pytest.mark.parametrize(("step", "weights"), [(1, "fresh weights"), (3, "step-00000002"), (5, "step-00000004")])
def test_a_step_has_the_loss_and_norm_that_it_had(
    solo: Mesh, recipe: dict[str, Any], folder: Path, step: int, weights: str
) -> None:
    found, line = again(folder, recipe, solo, step), log_lines(folder)[step - 1]
    assert weights in found.weights and found.first_bad is None
    assert found.loss == pytest.approx(line["loss"], rel=1e-5)
    # A rule freezes one matrix in the run; here all have gradients.
    assert found.norm == pytest.approx(line["grad_norm"], rel=0.05) and found.norm >= line["grad_norm"]
    assert len(found.samples) == 16 and {s.slot for s in found.samples} == set(range(16 * (step - 1), 16 * step))
    assert [s.loss for s in found.samples] == sorted((s.loss for s in found.samples), reverse=True)
    norms = [gradient for _, _, gradient in found.layers]
    assert math.sqrt(sum(x * x for x in norms)) == pytest.approx(found.norm, rel=1e-5)


def test_a_step_between_checkpoints_takes_its_own_batch_and_older_weights(
    solo: Mesh, recipe: dict[str, Any], folder: Path
) -> None:
    found = again(folder, recipe, solo, 4)
    assert "step-00000002" in found.weights and {s.slot for s in found.samples} == set(range(48, 64))
    with pytest.raises(ValueError, match="--step 7: the run has steps 1 to 6"):
        again(folder, recipe, solo, 7)


def test_the_first_module_and_the_worst_samples_are_named(
    solo: Mesh,
    recipe: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = replay._model

    def spoilt(*arguments: Any) -> Any:
        model, weights = original(*arguments)
        layer = model.backbone.encoder.layers["1"]

        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            return torch.full_like(output, math.nan)

        layer.final_layer_norm.B.register_forward_hook(spoil)
        return model, weights

    with monkeypatch.context() as patch:
        patch.setattr(replay, "_model", spoilt)
        found = again(folder, recipe, solo, 3)
    assert found.first_bad == (
        "the first module with an output that is not finite: backbone.encoder.layers.1.final_layer_norm.B"
    )
    assert not math.isfinite(found.samples[0].loss)
    replay.write_page(found, tmp_path / "page.html", "run", 5)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<img src=") == 5 and found.samples[0].key in page and found.samples[0].captions[1] in page
    assert "layers.1.final_layer_norm" in page
    replay.tell(found)
    assert "loss not finite" in capsys.readouterr().out

    def bad_weight(*arguments: Any) -> Any:
        model, weights = original(*arguments)
        with torch.no_grad():
            model.itc_vl_text_proj.fc.weight[0, 0] = math.inf
        return model, weights

    monkeypatch.setattr(replay, "_model", bad_weight)
    assert (
        again(folder, recipe, solo, 3).first_bad
        == "the weights are not finite: itc_vl_text_proj.fc.weight is the first"
    )
