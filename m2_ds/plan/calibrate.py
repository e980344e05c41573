"""What a step of a real engine takes beyond what speeds of layers, updates and collectives tell of it.

A few small models are run; what the planner cannot explain of their steps becomes speeds of its own: of a step, of a
tensor, of the update by ZeRO stage, of ZeRO 3's gathers, of a layer that tensor-parallel ranks share. The models are
none that predictions are compared with.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from m2_ds.config import RunConfig
from m2_ds.model.stack import Part
from m2_ds.plan.cluster import Cluster
from m2_ds.plan.layout import Candidate, Load
from m2_ds.plan.measure_rank import HEAD, TOKENS
from m2_ds.plan.search import Planner, Prediction
from m2_ds.plan.trial import trial_tree
from m2_ds.plan.weights import weights_of

Tree = dict[str, Any]
Timed = Callable[[list[Tree]], list[dict[str, float]]]
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
LEAST_SHARE = 0.05  # of what is known already; timings on a busy machine may tell less than nothing
LEAST_NS = 0.05  # of a parameter

_TINY = {"preset": "test", "num_heads": 2, "hidden_size": 2 * HEAD, "embed_dim": 32}
_DEPTHS = (1, 7)
_PAIRS = 4  # of a rank
_MOST_CUT = 8  # tensor-parallel ranks of a trial, whose width grows with them
_HEAVY = {  # nearly all weights, one of which is too large for memory that has been freed
    "preset": "test", "hidden_size": 512, "num_heads": 8, "num_layers": 4, "embed_dim": 256, "vocab_size": 20_000,
}  # fmt: skip
_MANY = {"preset": "test", "hidden_size": 256, "num_heads": 4, "num_layers": 8}  # tensors that are gathered
TRIAL_LOAD = Load(1, TOKENS[1] - 1, (TOKENS[0] + TOKENS[1] - 1) / 2)


def calibrate(machine: Tree, timed: Timed) -> None:
    """Put into ``machine``'s speeds what steps of real engines take beyond what these speeds tell of them.

    ``timed``: seconds of steps of recipes in one layout, by phase (`Trial.median`).
    """
    ranks = machine["ranks_per_node"]
    _steps_and_updates(machine, timed, ranks)
    if ranks > 1:
        # ZeRO 3 replaces torch's linear layer for good, and a layout's groups stay: processes of their own.
        _partitioned(machine, timed, ranks)
        _cut_layers(machine, timed, ranks)


def _steps_and_updates(machine: Tree, timed: Timed, ranks: int) -> None:
    recipes = [
        *(_recipe({**_TINY, "num_layers": depth}, "zero1", p, ranks) for p in PRECISIONS for depth in _DEPTHS),
        *(_recipe(_HEAVY, zero, p, ranks) for p in PRECISIONS for zero in ("zero0", "zero1")),
    ]
    compared = [_Compared(recipe, found) for recipe, found in zip(recipes, timed(recipes))]
    for precision in PRECISIONS:
        speeds = machine["arithmetic"][precision]
        small, deep, whole, split = (x for x in compared if x.config.engine.precision == precision)
        rest = [x.beyond(machine, "update") for x in (small, deep, split)]
        terms = [[x.predicted(machine)["update"], 1.0, float(x.weights.tensors)] for x in (small, deep, split)]
        update, step, tensor = _nonnegative(terms, rest)
        for name in ("gradient_ns", "update_ns"):
            speeds[name] = rounded(speeds[name] * max(update, LEAST_SHARE))
        speeds["step_ms"], speeds["tensor_us"] = rounded(step * 1e3), rounded(tensor * 1e6)
        of_whole = whole.beyond(machine, "update") / whole.weights.trained
        speeds["whole_update_ns"] = rounded(max(of_whole * 1e9, LEAST_NS))


def _partitioned(machine: Tree, timed: Timed, ranks: int) -> None:
    recipes = [_recipe(model, "zero3", p, ranks) for p in PRECISIONS for model in (_MANY, _HEAVY)]
    compared = [_Compared(recipe, found) for recipe, found in zip(recipes, timed(recipes))]
    for precision in PRECISIONS:
        both = [x for x in compared if x.config.engine.precision == precision]
        gathers = [x.times["forward"] - x.predicted(machine)["forward"] for x in both]
        updates = [x.beyond(machine, "update", "send parameters") - s for x, s in zip(both, gathers)]
        messages = [x.prediction(machine).traffic[0].messages["parameters"] for x in both]
        gather = _nonnegative([[float(x.weights.all), count] for x, count in zip(both, messages)], gathers)
        update = _nonnegative([[float(x.weights.trained), float(x.weights.tensors)] for x in both], updates)
        machine["arithmetic"][precision]["partitioned"] = {
            "gather_ns": rounded(gather[0] * 1e9),
            "gather_us": rounded(gather[1] * 1e6),
            "update_ns": rounded(update[0] * 1e9),
            "tensor_us": rounded(update[1] * 1e6),
        }


def _cut_layers(machine: Tree, timed: Timed, ranks: int) -> None:
    cut = next((size for size in range(2, _MOST_CUT + 1) if ranks % size == 0), 0)
    if not cut:
        return
    model = {**_TINY, "num_heads": 2 * cut, "hidden_size": 2 * HEAD * cut}
    recipes = [_recipe({**model, "num_layers": depth}, "zero1", p, ranks, cut) for p in PRECISIONS for depth in _DEPTHS]
    compared = [_Compared(recipe, found) for recipe, found in zip(recipes, timed(recipes))]
    launches = 2 * (_DEPTHS[1] - _DEPTHS[0])  # of pictures and of captions
    for precision in PRECISIONS:
        small, deep = (x for x in compared if x.config.engine.precision == precision)
        for side in ("forward", "backward"):
            more = (deep.beyond_phase(machine, side) - small.beyond_phase(machine, side)) / launches
            machine["arithmetic"][precision][f"cut_layer_{side}_us"] = rounded(max(more, 0.0) * 1e6)


def _nonnegative(terms: list[list[float]], seconds: list[float]) -> list[float]:
    """Costs of one of each term, [equations, terms] x costs = seconds; terms that noise makes negative are left out."""
    a, y = np.array(terms), np.array(seconds)
    scale, kept, costs = a.max(axis=0), [*range(a.shape[1])], np.zeros(a.shape[1])
    while kept:
        found = np.linalg.lstsq(a[:, kept] / scale[kept], y, rcond=None)[0]
        if found.min() >= 0:
            costs[kept] = found / scale[kept]
            break
        del kept[int(found.argmin())]
    return [float(cost) for cost in costs]


def _recipe(model: Tree, zero: str, precision: Precision, ranks: int, tensor: int = 1) -> Tree:
    """Of few pairs a rank."""
    tree = trial_tree(model, zero, _PAIRS * ranks // tensor, _PAIRS, precision)
    return {**tree, "parallel": {"tensor_parallel_size": tensor}}


class _Compared:
    """A recipe's step: what it took, and what a machine's speeds tell of it."""

    def __init__(self, recipe: Tree, times: dict[str, float]) -> None:
        self.recipe, self.times = recipe, times
        self.config = RunConfig.model_validate(recipe)
        tensor = self.config.parallel.tensor_parallel_size
        self.weights = weights_of(self.config, Part.whole(self.config.model), tensor)

    def prediction(self, machine: Tree) -> Prediction:
        cluster = Cluster.model_validate(machine)
        planner = Planner(self.recipe, self.config, cluster, TRIAL_LOAD)
        return planner.predict(Candidate.of(self.config, cluster.ranks))

    def predicted(self, machine: Tree) -> dict[str, float]:
        return {"update": 0.0, **self.prediction(machine).time.parts}

    def beyond(self, machine: Tree, *left_out: str) -> float:
        """Seconds of the step beyond what is told of it; ``left_out``: parts of that."""
        return self.times["total"] - sum(s for name, s in self.predicted(machine).items() if name not in left_out)

    def beyond_phase(self, machine: Tree, side: str) -> float:
        """The same of a pass, in which half of what is sent in passes goes."""
        parts = self.predicted(machine)
        return self.times[side] - parts[side] - parts.get("send in passes", 0.0) / 2


def rounded(x: float) -> float:
    """Three digits."""
    return float(f"{x:.3g}")
