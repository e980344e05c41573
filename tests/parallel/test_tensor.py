"""Layers cut over tensor-parallel ranks: a LayerNorm over a cut width, the vocabulary, and what is refused."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from m2_ds.parallel.collectives import all_gather_rows
from m2_ds.parallel.config import Layout, ParallelConfig
from m2_ds.parallel.mesh import Mesh
from m2_ds.parallel.split import Split
from tests.support.ranks import run_ranks

TOKENS, WIDTH = 11, 24


def split_norms(mesh: Mesh) -> list[tuple[str, float]]:
    """(what, largest relative error against a whole LayerNorm in fp64) of output and gradients."""
    from m2_ds.parallel.tensor import SplitNorm

    mesh = mesh.with_layout(ParallelConfig(tensor_parallel_size=mesh.world_size))
    found = []
    for dtype, mean in ((torch.float64, 0.0), (torch.float64, 30.0), (torch.float32, 0.0), (torch.float32, 3.0)):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2, TOKENS, WIDTH, generator=g, dtype=torch.float64) + mean
        weight, bias = (torch.randn(WIDTH, generator=g, dtype=torch.float64) for _ in range(2))
        upstream = torch.randn(x.shape, generator=g, dtype=torch.float64)
        whole = [t.clone().requires_grad_() for t in (x, weight, bias)]
        wanted = F.layer_norm(whole[0], (WIDTH,), whole[1], whole[2], 1e-5)
        wanted.backward(upstream)
        norm = SplitNorm(WIDTH, 1e-5, mesh.tensor).to(dtype)
        own = [t.chunk(mesh.world_size, -1)[mesh.rank].to(dtype) for t in (x, weight, bias, upstream)]
        with torch.no_grad():
            norm.weight.copy_(own[1])
            norm.bias.copy_(own[2])
        mine = own[0].clone().requires_grad_()
        y = norm(mine)
        y.backward(own[3])
        pairs = {
            "output": (y, wanted), "input": (mine.grad, whole[0].grad),
            "weight": (norm.weight.grad, whole[1].grad), "bias": (norm.bias.grad, whole[2].grad),
        }  # fmt: skip
        for what, (got, want) in pairs.items():
            assert got is not None and want is not None
            want = want.chunk(mesh.world_size, -1)[mesh.rank]
            error = float((got.double() - want).abs().max() / want.abs().max())
            found.append((f"{dtype} mean {mean}: {what}", error))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_norm_over_a_cut_width_is_exact(ranks: int) -> None:
    for found in run_ranks(ranks, split_norms):
        for what, error in found:
            assert error < (1e-11 if "float64" in what else 3e-6), what


def cross_entropies(mesh: Mesh) -> None:
    """21 tokens over 2 ranks (one row stands for none), 9 states in parts of 4, against all scores at once."""
    from m2_ds.parallel import rows
    from m2_ds.parallel.tensor import VocabularyColumns

    rows.SCORES, rows.LEAST_ROWS = 4, 4
    mesh = mesh.with_layout(ParallelConfig(tensor_parallel_size=2))
    g = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=g).requires_grad_() for shape in [(9, 6), (21, 6), (21,)])
    targets, scale = torch.randint(0, 21, (9,), generator=g), torch.rand(9, generator=g)
    scores = F.linear(x, weight, bias)
    wanted = F.cross_entropy(scores, targets, reduction="none")
    expected = torch.autograd.grad(wanted @ scale, [x, weight, bias])
    columns = VocabularyColumns(6, 21, mesh.tensor)
    held = slice(columns.held.start, columns.held.start + columns.held.length)
    with torch.no_grad():
        columns.weight[: columns.held.length], columns.bias[: columns.held.length] = weight[held], bias[held]
    found, right = columns(x, targets)
    assert right.tolist() == (scores.argmax(1) == targets).tolist()
    of_x, of_weight, of_bias = torch.autograd.grad(found @ scale, [x, columns.weight, columns.bias])
    assert_close(of_x, expected[0])
    assert_close(of_weight[: columns.held.length], expected[1][held])
    assert_close(of_bias[: columns.held.length], expected[2][held])
    assert not of_weight[columns.held.length :].any()
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.distributed
def test_cross_entropy_over_a_cut_vocabulary() -> None:
    run_ranks(2, cross_entropies)


def places(mesh: Mesh) -> list[tuple[int, ...]]:
    """(tensor, data, stage) and the ranks whose place is heard in this rank's groups."""
    mesh = mesh.with_layout(ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2))
    me = torch.tensor([float(mesh.rank)])
    groups = (mesh.tensor, mesh.data_parallel, mesh.pipeline)
    heard = [tuple(map(int, all_gather_rows(me, group, "places").tolist())) for group in groups]
    return [(mesh.tensor.rank, mesh.data_parallel.rank, mesh.pipeline.rank), *heard]


@pytest.mark.distributed
def test_neighbours_share_layers_and_stages_lie_farthest_apart() -> None:
    found = run_ranks(8, places)
    assert found[0] == [(0, 0, 0), (0, 1), (0, 2), (0, 4)]
    assert found[7] == [(1, 1, 1), (6, 7), (5, 7), (3, 7)]
    assert found[2] == [(0, 1, 0), (2, 3), (0, 2), (2, 6)]


def test_sizes_that_do_not_fit_the_ranks_are_refused() -> None:
    config = ParallelConfig(tensor_parallel_size=4, pipeline_parallel_size=2)
    with pytest.raises(ValueError, match=r"4 x .*2 does not divide 12 rank\(s\); start a multiple of 8, or"):
        Layout.of(config, 12)
    with pytest.raises(ValueError, match="does not divide 4"):
        Layout.of(config, 4)
    layout = Layout.of(config, 24)
    assert layout == Layout(tensor=4, data=3, pipeline=2)
    assert [layout.rank(*layout.place(rank)) for rank in range(24)] == list(range(24))


def test_pieces_of_a_whole_that_does_not_divide() -> None:
    whole = torch.arange(10)
    pieces = [Split(0, index, 4, 10) for index in range(4)]
    assert [split.of(whole).tolist() for split in pieces] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert pieces[3].filled(torch.tensor([9, 0, 0])).tolist() == [9]
    assert pieces[3].whole_shape((3,)) == (10,)
    columns = Split(1, 1, 2, 6)
    assert columns.of(torch.arange(12).view(2, 6)).tolist() == [[3, 4, 5], [9, 10, 11]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sequence_parallel": True}, "needs tensor_parallel_size > 1"),
        ({"pipeline_parallel_size": 3, "pipeline_layers": [1, 2]}, "names 2 stages, pipeline_parallel_size is 3"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParallelConfig.model_validate(settings)
