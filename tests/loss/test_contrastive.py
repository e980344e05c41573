"""The tiled loss and its closed-form gradients in one process, against autograd on the full matrix."""

import itertools
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from m2_ds.loss import answers, tiles
from m2_ds.loss.config import LossConfig
from m2_ds.loss.contrastive import Level, contrastive_loss, exchange_and_compare
from m2_ds.loss.exchange import Exchange
from m2_ds.parallel.mesh import SOLO
from tests.loss.problem import Problem, gradients_of, relative

REPEATS = ("positive", "exclude", "negative")
FORMS = [
    *({"repeats": r, "label_smoothing": s} for r, s in itertools.product(REPEATS, (0, 0.2))),
    *({"repeats": r, "form": "sigmoid"} for r in REPEATS),
]


@pytest.fixture(params=["one tile", "many tiles"])
def tile_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "many tiles":
        for module in (answers, tiles):
            monkeypatch.setattr(module, "TILE_ROWS", 5)
            monkeypatch.setattr(module, "TILE_COLUMNS", 3)
    yield


@pytest.mark.usefixtures("tile_size")
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("captions", [1, 2])
def test_equals_autograd_on_the_full_matrix(options: dict[str, object], captions: int) -> None:
    config = LossConfig.model_validate(options)
    problem = Problem.random(captions, 14, captions)
    loss = exchange_and_compare(problem.features(), problem.levels(config.form), problem.ids, SOLO, config)
    assert float(loss.value) == pytest.approx(problem.dense(config).item(), rel=1e-12)
    for found, wanted in zip(gradients_of(loss), problem.dense_gradients(config), strict=True):
        assert relative(found, wanted) < 1e-12
    assert loss.repeated == int((problem.ids[:, None] == problem.ids).sum()) - 14
    assert loss.pairs == 14


@pytest.mark.usefixtures("tile_size")
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_padding_rows_do_not_count(options: dict[str, object]) -> None:
    config = LossConfig.model_validate(options)
    problem = Problem.random(7, 13, 2)
    problem.ids[[2, 3, 4, 11, 12]] = answers.PADDING  # a whole tile of rows among them
    loss = exchange_and_compare(problem.features(), problem.levels(config.form), problem.ids, SOLO, config)
    assert loss.pairs == 8
    assert float(loss.value) == pytest.approx(problem.dense(config).item(), rel=1e-12)
    for found, wanted in zip(gradients_of(loss), problem.dense_gradients(config), strict=True):
        assert relative(found, wanted) < 1e-12
    assert (loss.by_pair[..., problem.ids < 0] == 0).all()


def test_a_batch_of_padding_alone_is_refused() -> None:
    problem = Problem.random(7, 4, 1)
    with pytest.raises(ValueError, match="without a single pair"):
        exchange_and_compare(problem.features(), problem.levels(), torch.full((4,), -1), SOLO, LossConfig())


def test_micro_batches_are_one_batch() -> None:
    problem, config = Problem.random(3, 12, 2), LossConfig()
    exchange = Exchange(problem.ids, SOLO, 3)
    for rows in torch.arange(12).chunk(3):
        exchange.send([x[rows] for x in problem.features()])
    loss = contrastive_loss(problem.levels(), exchange.receive(), config)
    whole = exchange_and_compare(problem.features(), problem.levels(), problem.ids, SOLO, config)
    for a, b in zip([loss.by_pair, *gradients_of(loss)], [whole.by_pair, *gradients_of(whole)], strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("tile_size")
def test_survives_a_scale_at_which_a_fixed_shift_underflows() -> None:
    """Rows whose largest logit lies 200 below the bound exp(logit_scale) = 403: exp(-200) is 0 in fp32."""
    g = torch.Generator().manual_seed(3)
    image = F.normalize(torch.randn(10, WIDTH := 8, generator=g), dim=-1)
    text = F.normalize(torch.randn(10, WIDTH, generator=g) - image, dim=-1)
    level = Level(torch.tensor([6.0]))
    loss = exchange_and_compare([image, text], [level], torch.arange(10), SOLO, LossConfig())
    logits = level.logit_scale.double().exp() * image.double() @ text.double().T
    assert (logits.amax(1) < 403 - 150).any()
    wanted = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    assert float(loss.value) == pytest.approx(wanted.item(), rel=1e-5)
    assert all(torch.isfinite(g).all() for g in gradients_of(loss))


def test_half_precision_features_are_widened() -> None:
    """In bf16 logits near 14 lie 1/16 apart: the loss would stand still near ln(batch)."""
    problem = Problem.random(4, 64, 1, torch.float32)
    low = [x.detach().bfloat16() for x in problem.features()]
    loss = exchange_and_compare(low, problem.levels(), problem.ids, SOLO, LossConfig())
    assert loss.value.dtype == torch.float32
    wanted = problem.dense(LossConfig(), [x.double() for x in low])
    assert float(loss.value) == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_nan_does_not_pass(form: str) -> None:
    problem = Problem.random(5, 8, 1)
    with torch.no_grad():
        problem.raw[0][2, 3] = float("nan")
    config = LossConfig.model_validate({"form": form})
    loss = exchange_and_compare(problem.features(), problem.levels(form), problem.ids, SOLO, config)
    assert torch.isnan(loss.value)
    assert any(torch.isnan(g).any() for g in gradients_of(loss))


class _Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_no_matrix_of_all_logits_is_ever_made(monkeypatch: pytest.MonkeyPatch, options: dict[str, object]) -> None:
    for module in (answers, tiles):
        monkeypatch.setattr(module, "TILE_ROWS", 32)
        monkeypatch.setattr(module, "TILE_COLUMNS", 64)
    problem, config = Problem.random(6, 400, 1), LossConfig.model_validate(options)
    features, levels = [x.detach() for x in problem.features()], problem.levels(config.form)
    with _Largest() as largest:
        exchange_and_compare(features, levels, problem.ids, SOLO, config)
    assert 2 * 32 * 64 <= largest.numbers <= 400 * 8 * 2  # two tiles, or the features


class _Looks(TorchDispatchMode):
    """Operations that make the host wait for a number of the device."""

    found: ClassVar[list[str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.__name__
        if name.startswith(("_local_scalar_dense", "nonzero", "masked_select")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("both", [True, False])
def test_the_device_is_never_waited_for(monkeypatch: pytest.MonkeyPatch, both: bool) -> None:
    """With the shortcut that only a CPU takes left out; it gives the same numbers."""
    problem = Problem.random(8, 20, 1)
    image, text = (x.detach() for x in problem.features()[:2])
    marks = answers.Answers(problem.ids, problem.ids, torch.arange(20), "exclude", image.device, image.dtype)
    logits = tiles.Logits(3 * image, text, marks, both)

    def everything() -> list[torch.Tensor | None]:
        row, column = tiles.softmax_sums(logits, 0.1)
        other = row if column is None else column
        found = [row.lse, row.loss, *tiles.softmax_gradients(logits, row.lse, other.lse, 0.1)]
        return [*found, *vars(tiles.sigmoid_pass(logits, torch.tensor(-1.0))).values()]

    shortcut = everything()
    monkeypatch.setattr(tiles, "_may_look", lambda x: False)
    with _Looks() as looks:
        plain = everything()
    assert not looks.found
    for a, b in zip(shortcut, plain, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-12, rtol=1e-12)
