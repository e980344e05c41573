"""A made-up machine's steps tell calibrate what the machine is like."""

import copy
from typing import Any

import pytest

from m2_ds.config import RunConfig
from m2_ds.plan.calibrate import TRIAL_LOAD, Tree, calibrate
from m2_ds.plan.cluster import Cluster
from m2_ds.plan.layout import Candidate
from m2_ds.plan.search import Planner

KNOWN = {
    "products": [{"width": 128, "forward_tflops": 0.1, "backward_tflops": 0.1}],
    "attention": [{"length": 16, "forward_tflops": 0.05, "backward_tflops": 0.05}],
    "pointwise_forward_gbs": 10.0, "pointwise_backward_gbs": 10.0, "layer_forward_us": 200.0,
    "layer_backward_us": 300.0, "gradient_ns": 2.0, "update_ns": 6.0,
}  # fmt: skip
HIDDEN = {
    "gradient_ns": 3.0, "update_ns": 9.0, "whole_update_ns": 4.0, "step_ms": 20.0, "tensor_us": 50.0,
    "cut_layer_forward_us": 4000.0, "cut_layer_backward_us": 6000.0,
    "partitioned": {"gather_ns": 7.0, "gather_us": 500.0, "update_ns": 10.0, "tensor_us": 400.0},
}  # fmt: skip


def machine(ranks: int, **speeds: Any) -> Tree:
    link = {"bandwidth_gbs": 1.0, "latency_us": 100.0}
    arithmetic = {precision: {**copy.deepcopy(KNOWN), **speeds} for precision in ("fp32", "bf16")}
    return {
        "name": "made up", "basis": "measured", "device": "cpu", "ranks_per_node": ranks, "memory_gb": 8,
        "reserve_gb": 0, "arithmetic": arithmetic, "intra": link, "inter": link,
    }  # fmt: skip


def timed(ranks: int, noise: float, recipes: list[Tree]) -> list[dict[str, float]]:
    """Steps of the machine that is to be found, by phase as an engine's clock has them."""
    found = []
    for recipe in recipes:
        config = RunConfig.model_validate(recipe)
        planner = Planner(recipe, config, Cluster.model_validate(machine(ranks, **HIDDEN)), TRIAL_LOAD)
        time = planner.predict(Candidate.of(config, ranks)).time
        half = time.parts.get("send in passes", 0.0) / 2
        gather = time.parts["send parameters"] if "zero3" in recipe["engine"]["deepspeed"] else 0.0
        forward, backward = time.parts["forward"] + half + gather, time.parts["backward"] + half
        found.append({"total": time.total * noise, "forward": forward * noise, "backward": backward * noise})
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_speeds_do_not_tell_is_found_in_steps(ranks: int) -> None:
    given = machine(ranks)
    calibrate(given, lambda recipes: timed(ranks, 1.0, recipes))
    for speeds in given["arithmetic"].values():
        for name in ("gradient_ns", "update_ns", "whole_update_ns", "step_ms", "tensor_us"):
            assert speeds[name] == pytest.approx(HIDDEN[name], rel=0.03), name
        if ranks == 1:
            assert "partitioned" not in speeds and "cut_layer_forward_us" not in speeds
            continue
        assert speeds["partitioned"] == pytest.approx(HIDDEN["partitioned"], rel=0.03)
        for side in ("forward", "backward"):
            name = f"cut_layer_{side}_us"
            assert speeds[name] == pytest.approx(HIDDEN[name], rel=0.03)


def test_a_step_that_took_less_than_its_parts_leaves_no_negative_speeds() -> None:
    given = machine(2)
    calibrate(given, lambda recipes: timed(2, 0.01, recipes))
    Cluster.model_validate(given)  # refuses them
    assert given["arithmetic"]["fp32"]["step_ms"] == 0


@pytest.mark.parametrize(("ranks", "cut"), [(2, 2), (3, 3), (4, 2), (64, 2), (11, 0)])
def test_trials_fit_any_number_of_ranks(ranks: int, cut: int) -> None:
    """One set of processes runs recipes of one layout: ZeRO 3's and the cut ones are apart."""
    calls: list[list[Tree]] = []

    def told(recipes: list[Tree]) -> list[dict[str, float]]:
        calls.append(recipes)
        return timed(ranks, 1.0, recipes)

    calibrate(machine(ranks), told)
    kinds = [
        {(r["parallel"]["tensor_parallel_size"], "zero3" in r["engine"]["deepspeed"]) for r in call} for call in calls
    ]
    assert kinds == [{(1, False)}, {(1, True)}, {(cut, False)}][: 3 if cut else 2]
    assert all(r["global_batch"] == 4 * ranks // r["parallel"]["tensor_parallel_size"] for call in calls for r in call)
