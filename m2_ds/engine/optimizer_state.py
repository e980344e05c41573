"""What trains of every weight, and the optimizer's state of it, in fp32: read and set alike under every ZeRO stage.

They lie in one tensor a weight (stage 0), in a flat stretch of a parameter group on each data-parallel rank (stages 1,
2), or in an equal part of every weight on each (stage 3). Names of a state are the optimizer's own: exp_avg, exp_avg_sq
of AdamW, momentum of Muon; None stands for the weight itself, of which low precision keeps an fp32 master copy.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from m2_ds.convert.run_folder import MODEL, OPTIMIZER
from m2_ds.engine.setup import low_and_master
from m2_ds.parallel.collectives import all_gather_rows
from m2_ds.parallel.mesh import Group

_EXACT = "held_exactly"  # attribute of a frozen parameter
_ADAMW, _MUON = ("exp_avg", "exp_avg_sq"), ("momentum",)


class OptimizerState:
    """A view of an engine's optimizer. ``data_parallel``: the ranks over which it is partitioned."""

    def __init__(self, engine: Any, data_parallel: Group) -> None:
        self.wrapper, self.group, self.rank = engine.optimizer, data_parallel, data_parallel.rank
        self.stage = int(engine.zero_optimization_stage())
        self.torch: torch.optim.Optimizer = getattr(self.wrapper, "optimizer", self.wrapper)
        self._masters = dict(low_and_master(self.wrapper))
        # Of stage 0: Muon, which alone has parameters of two kinds, knows no other.
        self._names = {tensor: _names(group) for group in self.torch.param_groups for tensor in group["params"]}
        self._link()

    @property
    def names(self) -> list[str]:
        """Those that any parameter has, the same on every rank."""
        return sorted({name for group in self.torch.param_groups for name in _names(group)})

    def folders(self, checkpoint: Path) -> dict[str | None, Path]:
        """Where a checkpoint keeps the weights and each kind of state."""
        return {None: checkpoint / MODEL, **{name: checkpoint / OPTIMIZER / name for name in self.names}}

    def has(self, parameter: nn.Parameter, name: str | None) -> bool:
        if not parameter.requires_grad:
            return name is None
        return name is None or name in self._names.get(self._held(parameter), _ADAMW)

    def full(self, parameter: nn.Parameter, name: str | None) -> Tensor:
        """fp32, of the parameter's own shape. All data-parallel ranks call it: what is partitioned is gathered."""
        if not parameter.requires_grad:
            if (own := getattr(parameter, _EXACT, None)) is not None:
                whole = all_gather_rows(own.to(parameter.device), self.group, "checkpoint")
                shape = getattr(parameter, "ds_shape", parameter.shape)
                return whole[: shape.numel()].view(shape)
            if self.stage < 3:
                return parameter.detach().float()
            with GatheredParameters([parameter]):
                return parameter.detach().to(torch.float32, copy=True)
        if self.stage == 0:
            held = self._held(parameter)
            return held.detach() if name is None else self.torch.state[held][name]
        if name is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, name)

    def share(self, parameter: nn.Parameter, name: str | None) -> tuple[int, Tensor]:
        """What this data-parallel rank answers for of the flattened parameter: (its first place, the numbers there).

        The shares of all ranks make the whole. What every rank has whole is shared out evenly. Views where numbers lie
        in fp32 on this rank: they change as training goes on.
        """
        numel = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.requires_grad and self.stage in (1, 2):
            if (fragment := parameter._hp_mapping) is None:  # type: ignore[attr-defined]
                return 0, torch.empty(0)
            return fragment.lp_fragment_address.start, fragment.get_hp_fragment(name).detach().flatten()
        if not parameter.requires_grad and (own := getattr(parameter, _EXACT, None)) is not None:
            part = own
        elif self.stage == 3:
            if not parameter.requires_grad:
                part = parameter.ds_tensor.detach().flatten()  # type: ignore[attr-defined]
            else:
                part = (
                    safe_get_local_fp32_param(parameter)
                    if name is None
                    else safe_get_local_optimizer_state(parameter, name)
                )
        else:
            held = self._held(parameter)
            whole = (held if name is None else self.torch.state[held][name]).detach().flatten()
            size = -(-numel // self.group.size)
            part = whole[self.rank * size : (self.rank + 1) * size]
            return min(self.rank * size, numel), part.float()
        start = min(self.rank * part.numel(), numel)
        return start, part[: numel - start].float()  # without the filling at the end

    def begin(self, updates: int) -> None:
        """The state of an optimizer that has made ``updates`` updates, all zeros; what was there is gone.

        torch makes it in its first step only. That of parameters without meaning (a pipeline's fillers) stays so.
        """
        for tensor, names in self._tensors():
            state = {name: torch.zeros_like(tensor) for name in names}
            if names == _ADAMW:
                state["step"] = torch.tensor(float(updates), device=tensor.device)
            self.torch.state[tensor] = state
        for group in self.torch.param_groups:
            group["step"] = updates  # where apex's AdamW counts; torch's does in the state
        self._link()

    def put(self, parameter: nn.Parameter, name: str | None, read: Callable[[int, int], Tensor]) -> None:
        """Set what this rank holds of a parameter that trains.

        ``read(start, length)`` gives numbers of the flattened parameter, zeros beyond its end. The model's own copy in
        low precision is left as it is.
        """
        if self.stage == 0:
            held = self._held(parameter)
            target = held.data if name is None else self.torch.state[held][name]
            target.copy_(read(0, target.numel()).view_as(target))
        elif self.stage == 3:
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            value = read(self.rank * size, size)
            if name is None:
                safe_set_local_fp32_param(parameter, value)
            else:
                safe_set_local_optimizer_state(parameter, value, name)
        elif (fragment := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            address = fragment.lp_fragment_address
            fragment.get_hp_fragment(name).data.copy_(read(address.start, address.numel))

    def keep(self, parameter: nn.Parameter, read: Callable[[int, int], Tensor]) -> None:
        """Hold the fp32 numbers of a frozen parameter, which the model has in low precision, for checkpoints.

        Each data-parallel rank holds an equal part of them, in the host's memory. ``read`` as in `put`.
        """
        size = -(-getattr(parameter, "ds_numel", parameter.numel()) // self.group.size)
        setattr(parameter, _EXACT, read(self.rank * size, size))

    def _link(self) -> None:
        """Tell each parameter its part of the flat state.

        DeepSpeed does it once, after the first step of the first group, when other groups have no state yet.
        """
        if self.stage in (1, 2):
            self.wrapper._hp_optimizer_states_linked = False
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def _held(self, parameter: nn.Parameter) -> Tensor:
        return self._masters.get(parameter, parameter)

    def _tensors(self) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        """What the torch optimizer updates, with the names of its state."""
        if self.stage == 3:  # its groups are empty between steps
            yield from ((flat, _ADAMW) for flat in self.wrapper.fp32_partitioned_groups_flat)
        else:
            yield from self._names.items()


def _names(group: dict[str, Any]) -> tuple[str, ...]:
    return _MUON if group.get("muon") else _ADAMW
