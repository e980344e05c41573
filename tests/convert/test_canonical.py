"""Writing canonical files in turns, and reading stretches of inner parameters from whole tensors."""

import datetime
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from m2_ds.convert.canonical import INDEX, SINGLE, WeightWriter, outlines, read_stretch, read_weights, weight_files
from m2_ds.model.weights import Piece, fill
from m2_ds.parallel.config import Layout
from m2_ds.parallel.mesh import SOLO, Group, Mesh
from m2_ds.parallel.split import Split, mark
from m2_ds.parallel.traffic import Traffic

TENSORS = {name: torch.randn(4, 8) for name in ("a", "b", "c", "d", "e")}  # 128 bytes each


def mesh(rank: int, ranks: int) -> Mesh:
    """One of data-parallel ranks that never communicate."""
    data = Group(rank, ranks, None)
    return Mesh(
        rank, ranks, torch.device("cpu"), "none", Layout(1, ranks, 1), SOLO, data, SOLO, SOLO, SOLO, 1, 1, Traffic(),
        datetime.timedelta(minutes=1),
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("limit", "files"), [(10**6, 1), (300, 3), (128, 5), (1, 5)])
def test_ranks_write_files_in_turn(tmp_path: Path, ranks: int, limit: int, files: int) -> None:
    entries = [Piece(name, tensor, None) for name, tensor in TENSORS.items()]
    for rank in range(ranks):
        before = len(list(tmp_path.glob("*.safetensors")))
        writer = WeightWriter(mesh(rank, ranks), limit)
        writer.write(tmp_path, entries, iter(entries))
        writer.finish()
        assert len(list(tmp_path.glob("*.safetensors"))) - before == len(range(rank, files, ranks))
    assert len(weight_files(tmp_path)) == files
    assert (tmp_path / SINGLE).exists() == (files == 1) and (tmp_path / INDEX).exists() == (files > 1)
    found = read_weights(tmp_path)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[n], x) for n, x in TENSORS.items())
    for file in weight_files(tmp_path):
        with safe_open(file, framework="pt") as opened:
            assert sum(opened.get_tensor(n).numel() * 4 for n in opened.keys()) <= max(limit, 128)  # noqa: SIM118


def test_what_comes_in_another_order_is_no_checkpoint(tmp_path: Path) -> None:
    entries = [Piece(name, tensor, None) for name, tensor in TENSORS.items()]
    with pytest.raises(AssertionError, match="b came where a was announced"):
        WeightWriter(mesh(0, 1)).write(tmp_path, entries, iter(entries[1:]))


class Held(nn.Module):
    """Inner parameters as the second of two tensor-parallel ranks has them, or whole."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"qkv_proj": nn.Linear(3, 6 if cut else 12, bias=False)})
        self.columns = nn.Linear(4 if cut else 8, 5, bias=False)
        self.table = nn.Embedding(4 if cut else 7, 3)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        if cut:
            mark(self.attention["qkv_proj"].weight, Split(0, 1, 2, 4))
            mark(self.columns.weight, Split(1, 1, 2, 8))
            mark(self.table.weight, Split(0, 1, 2, 7))  # 4 and 3 rows, and one of filling


@pytest.mark.parametrize("cut", [False, True])
def test_a_stretch_of_an_inner_parameter_is_read_from_whole_tensors(cut: bool) -> None:
    model = Held(cut)
    whole = {p.name: torch.randn(p.whole_shape) for n, weight in model.named_parameters() for p in outlines(n, weight)}
    assert sorted(whole) == [
        *(f"attention.{x}_proj.weight" for x in "kqv"),
        *("columns.weight", "logit_scale"),
        "table.weight",
    ]
    assert whole["table.weight"].shape == (7, 3) and whole["columns.weight"].shape == (5, 8)
    fill(model, lambda piece: piece.split.of(whole[piece.name]) if piece.split else whole[piece.name])
    for name, parameter in model.named_parameters():
        flat = torch.cat([parameter.detach().flatten(), torch.zeros(3)])  # beyond the end: zeros
        for start in range(len(flat)):
            for end in range(start, len(flat) + 1):
                found = read_stretch(name, parameter, whole, start, end - start)
                assert torch.equal(found, flat[start:end]), (name, start, end)
