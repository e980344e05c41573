"""Loading a canonical state dict into a model, whole or a part of one."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import canonical_shapes
from m2_ds.model.weights import MASKED_HEADS, VISION_POSITIONS, fill, initial

_ROWS_BEFORE_PATCHES = 3  # two unused rows and the class token's


def resize_positions(table: Tensor, num_patches: int) -> Tensor:
    """A vision position table [n + 3, D] for another square grid, [num_patches + 3, D], by area interpolation in fp32.

    Smaller and larger tables are both resized (the reference cuts larger ones).
    """
    if table.shape[0] == num_patches + _ROWS_BEFORE_PATCHES:
        return table
    head, patches = table[:_ROWS_BEFORE_PATCHES], table[_ROWS_BEFORE_PATCHES:]
    old, new = math.isqrt(max(len(patches), 0)), math.isqrt(num_patches)
    if old * old != len(patches) or old == 0:
        raise ValueError(
            f"a vision position table of {len(table)} rows holds {len(patches)} patches, which is no square grid; "
            "it cannot be resized"
        )
    grid = patches.float().T.reshape(1, -1, old, old)
    resized = F.interpolate(grid, size=(new, new), mode="area")[0].flatten(1).T.to(table.dtype)
    return torch.cat([head, resized])


def load_weights(
    model: nn.Module,
    config: M2EncoderConfig,
    state: Mapping[str, Tensor],
    where: str,
    tell: Callable[[str], object] = print,
    opened: Callable[[nn.Parameter], AbstractContextManager[object]] = lambda _: contextlib.nullcontext(),
) -> None:
    """Load a canonical state dict, resizing vision positions where the grid differs (and saying so through ``tell``).

    A rank copies the pieces that it holds, so of memory-mapped tensors it reads no more. ``where`` names the file in
    errors; ``opened`` as in `fill`. Raises ValueError as `fitted` does.
    """
    fill_whole(model, fitted(config, state, where, tell), opened)


def fill_whole(
    model: nn.Module,
    state: Mapping[str, Tensor],
    opened: Callable[[nn.Parameter], AbstractContextManager[object]] = lambda _: contextlib.nullcontext(),
) -> None:
    """Copy a state dict that is `fitted` into a model; a rank reads the pieces that it holds."""
    fill(model, lambda piece: piece.split.of(state[piece.name]) if piece.split else state[piece.name], opened)


def fitted(
    config: M2EncoderConfig, state: Mapping[str, Tensor], where: str, tell: Callable[[str], object] = print
) -> dict[str, Tensor]:
    """A canonical state dict with the names and shapes of ``config``: vision positions resized where the grid differs.

    Heads of masked objectives are drawn where ``state`` has none, and left out where the model has none.

    Raises ValueError with every missing and unexpected name, or every wrong shape.
    """
    expected = canonical_shapes(config)
    state = _with_heads(config, state, expected, where, tell)
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{where} does not hold the weights of this model.\n"
            f"  missing ({len(missing)}): {_some(missing)}\n  unexpected ({len(unexpected)}): {_some(unexpected)}\n"
            "Check that the configuration belongs to the checkpoint (layers, stem) and that names carry no prefix."
        )
    found = dict(state)
    positions = state[VISION_POSITIONS]
    if len(positions) != expected[VISION_POSITIONS][0]:
        found[VISION_POSITIONS] = resize_positions(positions, config.num_patches)
        tell(
            f"{where}: vision position table resized from {len(positions)} to {len(found[VISION_POSITIONS])} rows "
            f"for {config.image_size} px pictures in {config.patch_size} px patches"
        )
    wrong = [f"{n} is {list(found[n].shape)}, not {list(s)}" for n, s in expected.items() if found[n].shape != s]
    if wrong:
        raise ValueError(
            f"{where}: {len(wrong)} tensors have another shape than the model: {_some(wrong)}.\n"
            "Check hidden_size, embed_dim, vocab_size and num_heads of the configuration."
        )
    return found


def _with_heads(
    config: M2EncoderConfig,
    state: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
    tell: Callable[[str], object],
) -> dict[str, Tensor]:
    found = {name: x for name, x in state.items() if name in expected or not name.startswith(MASKED_HEADS)}
    fresh = [name for name in expected if name.startswith(MASKED_HEADS) and name not in state]
    if left := len(state) - len(found):
        tell(f"{where}: {left} tensors of masked objectives' heads are left out, which this model does not have")
    if fresh:
        tell(f"{where}: {len(fresh)} tensors of masked objectives' heads are not there; they start from random values")
    return {**found, **{name: initial(name, expected[name], config, seed=0) for name in fresh}}


def _some(names: Iterable[str], limit: int = 40) -> str:
    names = list(names)
    return (", ".join(names[:limit]) + (f", ... {len(names) - limit} more" if len(names) > limit else "")) or "none"
