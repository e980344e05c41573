"""Muon for weight matrices and convolutions, AdamW for the rest, as one optimizer.

Muon (K. Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal one, so that every direction
in it learns at the same speed; scaled to the size of AdamW's updates (arXiv 2502.16982, section 2.2), both halves share
one learning rate. It needs whole matrices, which ZeRO 1 to 3 cut into flat pieces: stage 0 only.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The quintic iteration's coefficients: steep at 0, all singular values between 0.7 and 1.2 after five steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_UPDATE_SIZE = 0.2  # root mean square of an AdamW update


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups say ``muon``: True or False, and ``parts``: matrices stacked in each weight (q, k, v: 3).

    ``compute``: number format of the orthogonalisation; bf16 is enough for training in bf16.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, compute: torch.dtype, **adamw: Any) -> None:
        super().__init__(groups, {"momentum": momentum, **adamw})
        self.compute = compute
        self._share()

    def _share(self) -> None:
        """torch's AdamW works on its groups in place, with the state in one dictionary."""
        rest = [g for g in self.param_groups if not g["muon"]]
        self._adamw = torch.optim.AdamW(rest, fused=True) if rest else None
        if self._adamw is not None:
            self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            if group["muon"]:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._update(weight, weight.grad, group)
        if self._adamw is not None:
            self._adamw.step()

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
        nesterov = gradient.add(momentum, alpha=group["momentum"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        for piece, direction in zip(weight.chunk(group["parts"]), nesterov.chunk(group["parts"])):
            matrix = direction.flatten(1)  # a convolution's [out, in, 3, 3] as [out, 9 in]
            size = _UPDATE_SIZE * math.sqrt(max(matrix.shape))
            update = orthogonal(matrix.to(self.compute)).to(weight.dtype)
            piece.add_(update.view_as(piece), alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """U V^T, nearly, of a matrix U S V^T [n, m]: Newton-Schulz iteration on the smaller side."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
