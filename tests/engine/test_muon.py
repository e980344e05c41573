"""Muon's update against the singular value decomposition, its other half against torch's AdamW."""

import pytest
import torch
from torch import Tensor

from m2_ds.config import OptimConfig
from m2_ds.engine.muon import MuonAdamW, orthogonal
from m2_ds.engine.optim import freeze_unreached, parameter_groups
from m2_ds.loss.config import LossConfig
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder

ADAM = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_direction_keeps_its_singular_vectors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    u, s, v = torch.linalg.svd(torch.randn(*shape, generator=torch.Generator().manual_seed(1)), full_matrices=False)
    s = torch.linspace(5, 1, len(s))
    matrix = u @ s.diag() @ v
    found = orthogonal(matrix.to(dtype)).float()
    scales = u.T @ found @ v.T
    assert (scales.diagonal() > 0.6).all() and (scales.diagonal() < 1.3).all()
    rest = scales - scales.diagonal().diag()
    assert rest.abs().max() < (1e-4 if dtype == torch.float32 else 0.06)


def optimizer(weights: list[Tensor], parts: int = 1) -> MuonAdamW:
    matrices, others = [w for w in weights if w.dim() > 1], [w for w in weights if w.dim() == 1]
    groups = [{"params": matrices, "muon": True, "parts": parts, **ADAM}]
    groups += [{"params": others, "muon": False, "parts": 0, **ADAM}] if others else []
    return MuonAdamW(groups, momentum=0.9, compute=torch.float32, lr=0.01, betas=(0.9, 0.98), eps=1e-8)


def test_two_steps_by_hand() -> None:
    g = torch.Generator().manual_seed(2)
    weight, gradients = torch.randn(6, 2, 3, 3, generator=g), torch.randn(2, 6, 2, 3, 3, generator=g)
    trained = weight.clone().requires_grad_()
    muon = optimizer([trained])
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        trained.grad = gradient.clone()
        muon.step()
        momentum = 0.9 * momentum + gradient
        direction = orthogonal((gradient + 0.9 * momentum).reshape(6, 18)).reshape(weight.shape)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 18**0.5 * direction
    torch.testing.assert_close(trained.detach(), weight, atol=1e-6, rtol=1e-5)


def test_stacked_matrices_are_updated_one_by_one() -> None:
    g = torch.Generator().manual_seed(3)
    weight, gradient = torch.randn(12, 4, generator=g), torch.randn(12, 4, generator=g)
    stacked = weight.clone().requires_grad_()
    stacked.grad = gradient.clone()
    optimizer([stacked], parts=3).step()
    pieces = [piece.clone().requires_grad_() for piece in weight.chunk(3)]
    for piece, part in zip(pieces, gradient.chunk(3)):
        piece.grad = part.clone()
    optimizer(pieces).step()
    torch.testing.assert_close(stacked.detach(), torch.cat(pieces).detach(), atol=1e-6, rtol=1e-5)


def test_vectors_are_adamw_s_and_the_state_can_be_loaded() -> None:
    g = torch.Generator().manual_seed(4)
    matrix, vector = torch.randn(4, 4, generator=g), torch.randn(5, generator=g)
    mine, plain = vector.clone().requires_grad_(), vector.clone().requires_grad_()
    weight = matrix.clone().requires_grad_()
    muon = optimizer([weight, mine])
    adam = torch.optim.AdamW([plain], **ADAM, fused=True)
    for number in range(4):
        gradient = torch.randn(5, generator=g)
        weight.grad, mine.grad, plain.grad = torch.randn(4, 4, generator=g), gradient.clone(), gradient.clone()
        if number == 2:
            state = muon.state_dict()
            muon = optimizer([weight, mine])
            muon.load_state_dict(state)
        muon.step()
        adam.step()
        assert torch.equal(mine, plain)
    assert muon.state[weight]["momentum"].abs().max() > 0


def test_inputs_and_outputs_of_the_network_are_adamw_s() -> None:
    model = M2Encoder(M2EncoderConfig.preset("test", stem="conv"))
    freeze_unreached(model, LossConfig())
    names = {p: n for n, p in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(kind="muon"))
    parts = {names[p]: group["parts"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert all((parts[n] > 0) == group["muon"] for group in groups for n in (names[p] for p in group["params"]))  # type: ignore[attr-defined]
    layer = "backbone.encoder.layers.0"
    assert parts[f"{layer}.self_attn.qkv_proj.A.weight"] == 3
    assert parts[f"{layer}.ffn.B.fc1.weight"] == parts["backbone.vision_embed.proj.stages.0.conv.weight"] == 1
    for name in ("backbone.text_embed.weight", "itc_text_proj.fc.weight", "logit_scale", f"{layer}.ffn.A.fc1.bias"):
        assert parts[name] == 0
    assert parts["backbone.encoder.embed_positions.A.weight"] == parts["backbone.vision_embed.cls_token"] == 0
