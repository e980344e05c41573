"""Which part of a whole weight a rank holds."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Split:
    """The ``index``-th of ``count`` equal pieces along ``dim``, of ``whole`` rows or columns in all.

    Where ``whole`` does not divide, pieces are rounded up and the last ones filled with rows that stand for nothing.
    """

    dim: int
    index: int
    count: int
    whole: int

    @property
    def start(self) -> int:
        return min(self.index * self._each, self.whole)

    @property
    def length(self) -> int:
        """Rows (or columns) of the whole that this piece holds."""
        return min(self._each, self.whole - self.start)

    @property
    def _each(self) -> int:
        return -(-self.whole // self.count)

    def of(self, whole: Any) -> Any:
        """The piece of a whole tensor, or of a safetensors slice, which then reads nothing else."""
        here = slice(self.start, self.start + self.length)
        return whole[here] if self.dim == 0 else whole[:, here]

    def filled(self, piece: Tensor) -> Tensor:
        """The part of a rank's tensor that is of the whole, without the filling."""
        return piece.narrow(self.dim, 0, self.length)

    def whole_shape(self, piece: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.whole if dim == self.dim else size for dim, size in enumerate(piece))


def mark(parameter: nn.Parameter, split: Split) -> None:
    """Remember what ``parameter`` holds, for loading and saving, and for DeepSpeed, whose gradient norm counts split
    parameters on every rank and others on one."""
    parameter.held_piece = split  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def split_of(parameter: nn.Parameter) -> Split | None:
    """None: the parameter is whole."""
    return getattr(parameter, "held_piece", None)
