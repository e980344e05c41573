"""Numbers of a checkpoint copied into the host's memory, from which it is written while training changes them.

Each data-parallel rank copies what it answers for itself, without any communication: this is all that training waits
for. A whole tensor is put together from the ranks' shares when it is written, over groups that training does not use.

Memory of a rank, with D data-parallel ranks and N_t trained and N_f frozen numbers of its stage and tensor-parallel
part: about (12 N_t + 4 N_f) / D bytes (AdamW; Muon's matrices 8), kept from the first checkpoint to the end, and while
files are written the whole tensors of one of them: 4 bytes a number, at most 2 GiB.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from m2_ds.engine.optimizer_state import OptimizerState
from m2_ds.parallel.collectives import all_gather_objects, broadcast
from m2_ds.parallel.mesh import Group


class States(Protocol):
    """What is written of an optimizer: as it stands (`OptimizerState`), or as it stood (`Snapshot`)."""

    stage: int

    def folders(self, checkpoint: Path) -> dict[str | None, Path]: ...

    def has(self, parameter: nn.Parameter, name: str | None) -> bool: ...

    def full(self, parameter: nn.Parameter, name: str | None) -> Tensor:
        """fp32, of the parameter's own shape. All data-parallel ranks call it."""


class Snapshot:
    """Of ``state``. ``group``: the data-parallel ranks over which shares travel; every one of them makes it."""

    def __init__(self, state: OptimizerState, model: nn.Module, group: Group) -> None:
        self.state, self.group, self.stage = state, group, state.stage
        self._copies: dict[tuple[nn.Parameter, str | None], Tensor] = {}
        keys = [(p, name) for p in model.parameters() for name in (None, *state.names) if state.has(p, name)]
        places = []
        for parameter, name in keys:
            start, share = state.share(parameter, name)
            pinned = share.device.type == "cuda"
            self._copies[parameter, name] = torch.empty(share.numel(), pin_memory=pinned)
            places.append((start, share.numel()))
        everyone = all_gather_objects(places, group)
        self._places = {key: [of_rank[number] for of_rank in everyone] for number, key in enumerate(keys)}

    def bytes(self) -> int:
        """Of this rank's copy."""
        return sum(4 * copy.numel() for copy in self._copies.values())

    def take(self) -> None:
        """Copy the numbers as they stand."""
        for (parameter, name), copy in self._copies.items():
            _, share = self.state.share(parameter, name)
            copy.copy_(share, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def finite(self) -> bool:
        """Whether the weights that this rank has copied are."""
        return all(bool(copy.isfinite().all()) for (_, name), copy in self._copies.items() if name is None)

    def folders(self, checkpoint: Path) -> dict[str | None, Path]:
        return self.state.folders(checkpoint)

    def has(self, parameter: nn.Parameter, name: str | None) -> bool:
        return self.state.has(parameter, name)

    def full(self, parameter: nn.Parameter, name: str | None) -> Tensor:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        out = torch.empty(shape.numel())
        for rank, (start, length) in enumerate(self._places[parameter, name]):
            if length:
                part = out[start : start + length]
                if rank == self.group.rank:
                    part.copy_(self._copies[parameter, name])
                broadcast(part, self.group, rank, "checkpoint")
        return out.view(shape)
