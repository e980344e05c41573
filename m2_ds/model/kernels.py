"""Kernels of other packages, where they are asked for and are there: NVIDIA's apex and transformer_engine.

Neither is ever needed. The package named apex on the Python index is another project: what counts is whether the CUDA
extensions of NVIDIA's can be imported.
"""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger(__name__)

_INSTALL_APEX = "build NVIDIA's apex (github.com/NVIDIA/apex) with its CUDA extensions, or set engine.apex: false"


@dataclass(frozen=True)
class Kernels:
    """What layers are made with: ``norm`` (width, eps), ``linear`` and ``query_key_value`` (in, out); torch's own."""

    norm: Callable[[int, float], nn.Module] = nn.LayerNorm
    linear: Callable[[int, int], nn.Module] = nn.Linear
    query_key_value: Callable[[int, int], nn.Module] | None = None


TORCH = Kernels()


def choose(apex: bool, fp8: bool, device: torch.device) -> Kernels:
    """Those asked for; which they are is logged. Raises ValueError where one cannot be had."""
    if (apex or fp8) and device.type != "cuda":
        asked = "apex" if apex else "fp8"
        raise ValueError(f"engine.{asked} needs a GPU, and this rank runs on {device}; set it to false")
    norm: Callable[[int, float], nn.Module] = nn.LayerNorm
    if apex:
        norm = _of_apex("apex.normalization", "FusedLayerNorm", "fused_layer_norm_cuda")
    log.info("kernels: LayerNorm by %s, matrix products by %s", "apex" if apex else "torch",
             "transformer_engine in fp8" if fp8 else "torch")  # fmt: skip
    if not fp8:
        return Kernels(norm)
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"engine.fp8: {torch.cuda.get_device_name(device)} has no fp8 arithmetic; set it to false")
    linear, joint = _fp8_linears()
    return Kernels(norm, linear, joint)


def queries_apart(joint: Any, x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """q of ``queries`` [..., D] and k, v of x [..., 2 D], by a ``joint`` linear layer [D -> 3 D]."""
    width = joint.in_features
    q = F.linear(queries, joint.weight[:width], joint.bias[:width])
    return q, F.linear(x, joint.weight[width:], joint.bias[width:])


def fused_adam() -> Any:
    """apex's class. Raises ValueError where it cannot be had."""
    return _of_apex("apex.optimizers", "FusedAdam", "amp_C")


def _of_apex(module: str, name: str, extension: str) -> Any:
    try:
        importlib.import_module(extension)
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"engine.apex: {error}; {_INSTALL_APEX}") from None


def _fp8_linears() -> tuple[Any, Any]:
    """Linear layers whose products are in fp8.

    Scales come from the numbers at hand, not from a history of them: the second pass of a step, and a layer that is
    computed again, must repeat the first.
    """
    try:
        te: Any = importlib.import_module("transformer_engine.pytorch")
        recipe = importlib.import_module("transformer_engine.common.recipe").Float8CurrentScaling()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"engine.fp8: {error}; install transformer_engine[pytorch] 2.2 or newer, or set engine.fp8: false"
        ) from None

    class Fp8Linear(te.Linear):  # type: ignore[name-defined, misc]
        def forward(self, x: Tensor) -> Any:
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                return super().forward(x)

    class Fp8QueryKeyValue(Fp8Linear):
        """As `m2_ds.model.layers.QueryKeyValue`; few queries are not worth fp8."""

        def forward(self, x: Tensor, queries: Tensor | None = None) -> Any:
            return super().forward(x) if queries is None else queries_apart(self, x, queries)

    return Fp8Linear, Fp8QueryKeyValue
