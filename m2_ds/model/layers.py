"""What a model is built from where its layers are whole; m2_ds.parallel.tensor has the same for layers that are cut.

How a model is sharded is decided by which of the two it is given.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from m2_ds.model.kernels import TORCH, Kernels, queries_apart
from m2_ds.parallel.rows import Undivided, told


class Layers(Protocol):
    """Widths are whole ones. A column layer gives a rank its share of ``out``, a row layer takes it."""

    sequence_ranks: int  # ranks over which tokens are cut between layers

    def query_key_value(self, width: int) -> nn.Module: ...
    def column(self, width: int, out: int) -> nn.Module: ...
    def row(self, width: int, out: int) -> nn.Module: ...
    def norm(self, width: int, eps: float) -> nn.Module: ...
    def split_norm(self, width: int, eps: float) -> nn.Module: ...
    def token_table(self, rows: int, width: int) -> nn.Module: ...
    def vocabulary(self, width: int, rows: int) -> nn.Module: ...

    def scatter(self, x: Tensor) -> Tensor:
        """Before the first layer: all tokens [1, N, D] to a rank's own."""

    def gather(self, x: Tensor) -> Tensor:
        """After the last layer: the inverse."""

    def own(self, x: Tensor) -> Tensor:
        """Of something [N, ...] that every token has one of, that of a rank's own."""


class QueryKeyValue(nn.Linear):
    """q, k and v in one product: [..., D] -> [..., 3 D]."""

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Any:
        """With ``queries`` [..., D]: their q [..., D], and k and v of x [..., 2 D]."""
        return super().forward(x) if queries is None else queries_apart(self, x, queries)


class Vocabulary(nn.Linear):
    """Scores of every token: [R, D] -> [R, V]; with ids [R] their cross entropy and hits (`parallel.rows.told`)."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        if targets is None:
            return super().forward(x)
        return told(x, self.weight, self.bias, targets, Undivided(self.out_features))


class WholeLayers:
    """Every layer whole on this rank, by ``kernels``."""

    sequence_ranks = 1

    def __init__(self, kernels: Kernels = TORCH) -> None:
        self._kernels = kernels

    def query_key_value(self, width: int) -> nn.Module:
        return (self._kernels.query_key_value or QueryKeyValue)(width, 3 * width)

    def column(self, width: int, out: int) -> nn.Module:
        return self._kernels.linear(width, out)

    row = column

    def norm(self, width: int, eps: float) -> nn.Module:
        return self._kernels.norm(width, eps)

    split_norm = norm

    def token_table(self, rows: int, width: int) -> nn.Module:
        return nn.Embedding(rows, width)

    def vocabulary(self, width: int, rows: int) -> nn.Module:
        return Vocabulary(width, rows)

    def scatter(self, x: Tensor) -> Tensor:
        return x

    gather = own = scatter


WHOLE = WholeLayers()
