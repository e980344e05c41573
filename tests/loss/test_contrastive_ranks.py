"""The loss over real ranks: each rank's gradients, averaged as the engine does, against one process with all pairs."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from m2_ds.loss.contrastive import Level, contrastive_loss
from m2_ds.parallel.collectives import all_reduce_sum
from m2_ds.parallel.mesh import SOLO, Mesh
from tests.support.ranks import run_ranks

PAIRS, CAPTIONS, WIDTH = 12, 2, 8


def problem() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    weights = {
        "image": torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=g),
        "text": torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=g),
        "scale": torch.tensor([2.0], dtype=torch.float64),
        "vl_scale": torch.tensor([3.0], dtype=torch.float64),
        "x": torch.randn(PAIRS, WIDTH, dtype=torch.float64, generator=g),
        "y": torch.randn(CAPTIONS, PAIRS, WIDTH, dtype=torch.float64, generator=g),
    }
    return weights, torch.randint(0, 6, (PAIRS,), generator=g)


def gradients(rows: slice, group, repeats: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    tensors, groups = problem()
    leaves = {name: tensors[name].clone().requires_grad_() for name in ("image", "text", "scale", "vl_scale")}
    image = F.normalize(tensors["x"][rows] @ leaves["image"], dim=-1)
    text = F.normalize(tensors["y"][:, rows] @ leaves["text"], dim=-1)
    levels = [
        Level(image, text, leaves["scale"], 0.5),
        Level(F.normalize(image**3, dim=-1), F.normalize(text**3, dim=-1), leaves["vl_scale"], 1.5),
    ]
    loss = contrastive_loss(levels, groups[rows], group, repeats)
    loss.total.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}, loss.by_pair, loss.total.detach()


def on_rank(mesh: Mesh, repeats: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    group = mesh.data_parallel
    own = PAIRS // group.size
    grads, by_pair, _ = gradients(slice(mesh.rank * own, (mesh.rank + 1) * own), group, repeats)
    return {name: all_reduce_sum(grad, group) / group.size for name, grad in grads.items()}, by_pair


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "repeats"), [(2, "positive"), (4, "positive"), (2, "exclude"), (4, "negative")])
def test_average_over_ranks_is_the_gradient_of_the_giant_batch(ranks: int, repeats: str) -> None:
    want, want_by_pair, _ = gradients(slice(None), SOLO, repeats)
    results = run_ranks(ranks, on_rank, repeats)
    for grads, _ in results:
        for name, grad in want.items():
            assert grad.abs().max() > 1e-3
            assert_close(grads[name], grad, atol=1e-14, rtol=1e-12)
    assert_close(torch.cat([by_pair for _, by_pair in results], dim=2), want_by_pair, atol=1e-14, rtol=1e-12)
