"""Kernels of other packages: refused with a reason where they cannot be had, used and logged where they are."""

import sys
import types

import pytest
import torch
from torch import nn

from m2_ds.model import kernels
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.layers import WholeLayers


@pytest.mark.parametrize(("apex", "fp8", "word"), [(True, False, "engine.apex"), (False, True, "engine.fp8")])
def test_a_cpu_has_neither(apex: bool, fp8: bool, word: str) -> None:
    with pytest.raises(ValueError, match=f"{word} needs a GPU, and this rank runs on cpu; set it to false"):
        kernels.choose(apex, fp8, torch.device("cpu"))


def test_the_other_package_named_apex_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(ValueError, match="fused_layer_norm_cuda.*build NVIDIA's apex"):
        kernels.choose(True, False, torch.device("cuda"))
    with pytest.raises(ValueError, match="amp_C"):
        kernels.fused_adam()


class FusedLayerNorm(nn.LayerNorm):
    """Has the interface of apex's."""


def test_apex_norms_are_used_and_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    apex, normalization = types.ModuleType("apex"), types.ModuleType("apex.normalization")
    normalization.FusedLayerNorm = FusedLayerNorm  # type: ignore[attr-defined]
    for name, module in {
        "fused_layer_norm_cuda": types.ModuleType("x"), "apex": apex, "apex.normalization": normalization
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    with caplog.at_level("INFO", "m2_ds.model.kernels"):
        chosen = kernels.choose(True, False, torch.device("cuda"))
    assert "LayerNorm by apex, matrix products by torch" in caplog.text
    model = M2Encoder(M2EncoderConfig.preset("test"), WholeLayers(chosen))
    layer = model.backbone.encoder.layers["0"]
    norms = [m for m in layer.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 8 and all(isinstance(norm, FusedLayerNorm) and norm.eps == 1e-5 for norm in norms)
