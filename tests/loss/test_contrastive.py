"""The closed-form loss and gradients against autograd on the full matrix, in one process and over real ranks."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from m2_ds.loss.contrastive import Level, contrastive_loss
from m2_ds.parallel.mesh import SOLO

REPEATS = ["positive", "exclude", "negative"]


def reference(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, groups: torch.Tensor, repeats: str
) -> torch.Tensor:
    """Mean of both directions' cross entropy, written plainly."""
    logits = scale.exp() * image @ text.T
    same, eye = groups[:, None] == groups, torch.eye(len(groups), dtype=torch.bool)
    target = (same if repeats == "positive" else eye).to(logits.dtype)
    target = target / target.sum(1, keepdim=True)
    if repeats == "exclude":
        logits = logits.masked_fill(same & ~eye, -1e9)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target.T)) / 2


def random_problem(seed: int, pairs: int, captions: int, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(seed)
    raw = [torch.randn(pairs, 8, dtype=dtype, generator=g).requires_grad_() for _ in range(2 * (1 + captions))]
    scales = [torch.tensor([s], dtype=dtype, requires_grad=True) for s in (1.5, 3.0)]
    return raw, scales, torch.randint(0, pairs // 2, (pairs,), generator=g)


def levels_of(raw: list[torch.Tensor], scales: list[torch.Tensor], captions: int) -> list[Level]:
    unit = [F.normalize(x, dim=-1) for x in raw]
    n = 1 + captions
    return [
        Level(unit[0], torch.stack(unit[1:n]), scales[0], 0.7),
        Level(unit[n], torch.stack(unit[n + 1 :]), scales[1], 1.3),
    ]


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("captions", [1, 2])
def test_equals_autograd_on_the_full_matrix(repeats: str, captions: int) -> None:
    raw, scales, groups = random_problem(captions, 14, captions)
    levels = levels_of(raw, scales, captions)
    want_loss = sum(
        level.weight
        * torch.stack([reference(level.image, t, level.logit_scale, groups, repeats) for t in level.text]).mean()
        for level in levels
    )
    want = torch.autograd.grad(want_loss, raw + scales, retain_graph=True)
    got_loss = contrastive_loss(levels, groups, SOLO, repeats)
    got = torch.autograd.grad(got_loss.total, raw + scales)
    assert_close(got_loss.total, want_loss, atol=1e-12, rtol=1e-12)
    for a, b in zip(got, want):
        assert_close(a, b, atol=1e-13, rtol=1e-12)
    weights = torch.tensor([0.7, 1.3], dtype=torch.float64)
    assert_close((weights[:, None, None] * got_loss.by_pair).mean((1, 2)).sum(), want_loss)


def test_survives_a_scale_that_underflows_a_fixed_shift() -> None:
    raw, _, groups = random_problem(3, 10, 1, torch.float32)
    scales = [torch.tensor([6.0], requires_grad=True) for _ in range(2)]  # exp(6) = 403
    loss = contrastive_loss(levels_of(raw, scales, 1), groups, SOLO, "negative")
    grads = torch.autograd.grad(loss.total, raw + scales)
    assert torch.isfinite(loss.total) and all(torch.isfinite(g).all() for g in grads)


def test_half_precision_features_are_widened() -> None:
    raw, scales, groups = random_problem(4, 64, 1, torch.float32)
    low = [x.detach().bfloat16().requires_grad_() for x in raw]
    got = contrastive_loss(levels_of(low, scales, 1), groups, SOLO, "negative")
    assert got.total.dtype == got.by_pair.dtype == torch.float32
    unit = levels_of(low, scales, 1)
    want = sum(
        level.weight * reference(level.image.float(), level.text[0].float(), level.logit_scale, groups, "negative")
        for level in unit
    )
    assert_close(got.total, want, atol=1e-5, rtol=1e-5)


def test_nan_does_not_pass() -> None:
    raw, scales, groups = random_problem(5, 8, 1)
    with torch.no_grad():
        raw[0][2, 3] = float("nan")
    assert torch.isnan(contrastive_loss(levels_of(raw, scales, 1), groups, SOLO).total)
