import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from m2_ds.parallel import rows
from m2_ds.parallel.rows import Undivided, told


@pytest.mark.parametrize("count", [1, 7, 8, 30])
def test_parts_give_the_cross_entropy_of_all_scores(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SCORES", 50 * 7)
    monkeypatch.setattr(rows, "LEAST_ROWS", 7)
    g = torch.Generator().manual_seed(count)
    x, weight, bias = (torch.randn(*shape, generator=g).requires_grad_() for shape in [(count, 6), (50, 6), (50,)])
    targets, scale = torch.randint(0, 50, (count,), generator=g), torch.rand(count, generator=g)
    scores = F.linear(x, weight, bias) * 40  # far apart: the sum of exponentials alone would overflow
    wanted = F.cross_entropy(scores, targets, reduction="none")
    expected = torch.autograd.grad(wanted @ scale, [x, weight, bias])
    found, right = told(x, weight * 40, bias * 40, targets, Undivided(50))
    assert_close(found, wanted)
    assert right.tolist() == (scores.argmax(1) == targets).tolist()
    for gradient, other in zip(torch.autograd.grad(found @ scale, [x, weight, bias]), expected):
        assert_close(gradient, other, atol=1e-3, rtol=1e-4)  # of numbers up to 100


def test_nothing_hidden_costs_and_changes_nothing() -> None:
    x, weight, bias = torch.zeros(0, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True), torch.zeros(50)
    losses, right = told(x, weight, bias, torch.zeros(0, dtype=torch.long), Undivided(50))
    assert losses.shape == right.shape == (0,)
    assert not torch.autograd.grad(losses.sum(), weight)[0].any()
