"""Seconds of a step from speeds that are easy to divide by, and collectives on links by hand."""

from typing import Any

import pytest

from m2_ds.config import RunConfig
from m2_ds.model.stack import Part
from m2_ds.plan.cluster import Arithmetic, Cluster, load_cluster
from m2_ds.plan.joint import joint_of, joint_work, scores_again
from m2_ds.plan.layout import Candidate, Load
from m2_ds.plan.memory import stage_parts
from m2_ds.plan.network import Network
from m2_ds.plan.time import StepTime, step_time
from m2_ds.plan.traffic import traffic_of
from m2_ds.plan.trial import trial_tree
from m2_ds.plan.weights import weights_of

FREE = 1e15  # so fast that it takes no time
MODEL = {"preset": "test", "num_layers": 6, "num_vl_layers": 2}


def cluster(**changes: Any) -> Cluster:
    speeds = {
        "products": [{"width": 32, "forward_tflops": 1e-3, "backward_tflops": 2e-3}],
        "attention": [{"length": 10, "forward_tflops": FREE, "backward_tflops": FREE}],
        "pointwise_forward_gbs": FREE, "pointwise_backward_gbs": FREE, "gradient_ns": 1e-9, "update_ns": 1e-9,
    }  # fmt: skip
    link = {"bandwidth_gbs": FREE, "latency_us": 0}
    tree: dict[str, Any] = {
        "name": "made up", "basis": "data sheet", "device": "gpu", "nodes": 2, "ranks_per_node": 4, "memory_gb": 80,
        "reserve_gb": 0, "arithmetic": {"fp32": speeds, "bf16": speeds}, "intra": link, "inter": link,
    }  # fmt: skip
    arithmetic = {name: {**speeds, **changes.pop("speeds", {})} for name in ("fp32", "bf16")}
    return Cluster.model_validate({**tree, "arithmetic": arithmetic, **changes})


def seconds(candidate: Candidate, there: Cluster, tree: dict[str, Any] | None = None) -> StepTime:
    config = RunConfig.model_validate(tree or trial_tree(MODEL, "zero1", 64, 8, "fp32"))
    load, stages = Load.of(config), stage_parts(config, candidate.pipeline)
    traffic = [traffic_of(config, candidate, load, False, stages, stage) for stage in range(len(stages))]
    return step_time(config, candidate, load, there, stages, traffic)


def candidate(**changes: Any) -> Candidate:
    base = {
        "tensor": 1, "pipeline": 1, "data": 8, "zero": "zero1", "group": 1, "micro_batch": 4, "accumulation": 4,
        "recompute": "none",
    }  # fmt: skip
    return Candidate(**{**base, **changes})


def test_passes_are_counted_by_what_is_kept() -> None:
    whole = seconds(candidate(), cluster()).parts
    assert whole["second forward"] == pytest.approx(whole["forward"] * 3 / 4)
    assert whole["backward"] == pytest.approx(whole["forward"], rel=0.02)  # twice the work at twice the speed
    kept = seconds(candidate(kept_graphs=4), cluster()).parts
    assert "second forward" not in kept
    again = seconds(candidate(recompute="full"), cluster()).parts
    assert again["recomputation"] == pytest.approx(whole["forward"])


def test_masked_objectives_run_once_and_score_twice() -> None:
    tree = trial_tree(MODEL, "zero1", 64, 8, "fp32")
    config = RunConfig.model_validate(tree | {"loss": {"cmlm": {"weight": 1.0}}})
    patches = seconds(candidate(), cluster(), tree | {"loss": {"cmim": {"weight": 1.0, "choose": "random"}}}).parts
    assert patches["masked backward"] == pytest.approx(patches["masked forward"], rel=1e-6)
    words = seconds(candidate(), cluster(), config.model_dump(mode="json")).parts
    joint, whole = joint_of(config, Load.of(config), 4), stage_parts(config, 1)[0]
    assert joint is not None
    again = 4 * scores_again(config.model, whole, joint).products / 1e9
    assert words["masked backward"] == pytest.approx(words["masked forward"] + again, rel=1e-6)
    plain = seconds(candidate(), cluster()).parts
    assert words["second forward"] == plain["second forward"]
    kept = seconds(candidate(kept_graphs=4), cluster(), config.model_dump(mode="json")).parts
    assert kept["masked forward"] == words["masked forward"] and "second forward" not in kept
    full = seconds(candidate(recompute="full"), cluster(), config.model_dump(mode="json")).parts
    of_layers = 4 * joint_work(config.model, whole, joint, 4).products / 1e9
    assert full["masked recomputation"] == pytest.approx(of_layers, rel=0.05)  # without heads


def test_a_pipeline_waits_for_its_slowest_stage() -> None:
    parts = seconds(candidate(pipeline=2, data=4), cluster()).parts
    busy = sum(parts[name] for name in ("forward", "second forward", "backward"))
    assert 0.7 * busy / 4 < parts["bubble"] < busy / 4  # (p - 1) / k, but the other stage is faster
    assert parts["second forward"] == parts["forward"]  # no graph is kept
    alone = seconds(candidate(data=4), cluster()).parts
    assert 0.5 * alone["forward"] < parts["forward"] < 0.7 * alone["forward"]


def test_mfu_counts_the_models_own_operations() -> None:
    whole, again = seconds(candidate(), cluster()), seconds(candidate(recompute="full"), cluster())
    assert whole.operations == again.operations
    assert again.tflops() < whole.tflops()


def ring(there: Cluster, kind: str, size: float, messages: float = 1, precision: str = "fp32", **changes: Any) -> float:
    return Network(there, candidate(**changes), precision).seconds(kind, size, messages)


def test_collectives_share_the_links_that_leave_a_node() -> None:
    link = {"bandwidth_gbs": 10, "latency_us": 0}
    there = cluster(intra={"bandwidth_gbs": 100, "latency_us": 0}, inter=link)
    assert ring(there, "gradients", 1e9, data=4) == pytest.approx(0.01)  # inside a node
    assert ring(there, "gradients", 1e9) == pytest.approx(0.1)
    # Four tensor-parallel ranks have four rings that leave each node.
    assert ring(there, "gradients", 1e9, tensor=4, data=2) == pytest.approx(0.4)
    assert ring(there, "tensor parallel", 1e9, tensor=4, data=2) == pytest.approx(0.01)
    assert ring(there, "features", 1e9, group=4) == pytest.approx(0.01)
    assert ring(there, "features", 1e9, group=8) == pytest.approx(0.1)
    assert ring(there, "pipeline", 1e9, pipeline=2, data=4) == pytest.approx(0.4)
    assert ring(there, "pipeline", 1e9, pipeline=2, data=2) == pytest.approx(0.01)
    assert ring(there, "features", 1e9, group=1) == 0


def test_hops_cost_latency() -> None:
    there = cluster(
        nodes=4, intra={"bandwidth_gbs": FREE, "latency_us": 1}, inter={"bandwidth_gbs": FREE, "latency_us": 10}
    )
    assert ring(there, "features", 1, data=16, group=4) == pytest.approx(3e-6)
    assert ring(there, "features", 1, data=16, group=16) == pytest.approx((12 + 40) * 1e-6)
    assert ring(there, "gradients", 1, data=16) == pytest.approx(2 * (3 + 20) * 1e-6)  # a tree over four nodes
    on_cpu = there.model_copy(update={"device": "cpu"})
    assert ring(on_cpu, "gradients", 1, messages=2, data=16) == pytest.approx(2 * 2 * (12 + 40) * 1e-6)


def test_sums_of_bf16_have_a_speed_of_their_own() -> None:
    there = cluster(intra={"bandwidth_gbs": 10, "latency_us": 0, "shares": {"all_reduce": 1, "all_reduce_bf16": 0.25}})
    assert ring(there, "gradients", 1e9, data=4) == pytest.approx(0.1)
    assert ring(there, "gradients", 1e9, precision="bf16", data=4) == pytest.approx(0.4)
    plain = cluster(intra={"bandwidth_gbs": 10, "latency_us": 0, "shares": {"all_reduce": 0.5}})
    assert ring(plain, "gradients", 1e9, precision="bf16", data=4) == pytest.approx(0.2)


def test_what_hides_behind_backward_is_bounded() -> None:
    slow = {"bandwidth_gbs": 1e-3, "latency_us": 0}
    there = cluster(intra=slow, inter=slow, overlap=0.5)
    shown = seconds(candidate(zero="zero1", accumulation=1), there).parts
    hidden = seconds(candidate(zero="zero2", accumulation=1), there).parts
    assert shown["send gradients"] - hidden["send gradients"] == pytest.approx(0.5 * hidden["backward"])


def test_sequence_parallel_sums_come_in_two_halves() -> None:
    there = cluster(
        intra={"bandwidth_gbs": 10, "latency_us": 0, "shares": {"reduce_scatter": 0.5, "all_gather": 0.25}},
    )
    assert ring(there, "tensor parallel", 1e9, tensor=2, data=4) == pytest.approx(0.1)
    halves = ring(there, "tensor parallel", 1e9, tensor=2, data=4, sequence=True)
    assert halves == pytest.approx(0.5 / 5 + 0.5 / 2.5)


def test_cut_layers_have_a_cost_of_their_own() -> None:
    speeds = {"cut_layer_forward_us": 1e3, "cut_layer_backward_us": 2e3}
    for tensor, launches in ((1, 0), (2, 4 * 18)):  # 8 layers and stems of two modalities, 4 micro-batches
        plain = seconds(candidate(tensor=tensor, data=4), cluster()).parts
        more = seconds(candidate(tensor=tensor, data=4), cluster(speeds=speeds)).parts
        assert more["forward"] - plain["forward"] == pytest.approx(launches * 1e-3, abs=1e-9)
        assert more["backward"] - plain["backward"] == pytest.approx(launches * 2e-3, abs=1e-9)


def test_zero_3_has_speeds_of_its_own() -> None:
    of = {"gather_ns": 4.0, "gather_us": 0.0, "update_ns": 6.0, "tensor_us": 0.0}
    three, tree = candidate(zero="zero3"), trial_tree(MODEL, "zero3", 64, 8, "fp32")
    numbers = weights_of(RunConfig.model_validate(tree), Part.whole(RunConfig.model_validate(tree).model), 1)
    parts = seconds(three, cluster(speeds={"partitioned": of}), tree).parts
    assert parts["update"] == pytest.approx(numbers.trained * 6e-9)
    assert parts["send parameters"] == pytest.approx((4 + 3) * numbers.all * 4e-9, rel=1e-3)  # a forward each
    each = candidate(zero="zero3", reduce_once=False)
    more = seconds(each, cluster(speeds={"partitioned": of, "gradient_ns": 2.0}), tree).parts["update"]
    assert more == pytest.approx(numbers.trained * (6 + 3 * 2) * 1e-9)  # four micro-batches, each reduced
    by_tensor = {"gather_ns": 0.0, "gather_us": 8.0, "update_ns": 0.0, "tensor_us": 5.0}
    parts = seconds(three, cluster(speeds={"partitioned": by_tensor}), tree).parts
    assert parts["update"] == pytest.approx(numbers.tensors * 5e-6)
    assert parts["send parameters"] == pytest.approx((4 + 3) * (numbers.tensors // 4) * 8e-6)
    alone = seconds(candidate(zero="zero3", data=1), cluster(speeds={"partitioned": by_tensor}), tree).parts
    assert "send parameters" not in alone and alone["update"] < 1e-6


def test_attention_is_as_fast_as_its_length() -> None:
    rates = [{"length": n, "forward_tflops": x, "backward_tflops": x} for n, x in ((10, 1e-3), (1000, 3e-3))]
    speeds = cluster(speeds={"attention": rates}).for_precision("fp32")
    assert speeds.attention_tflops(100) == pytest.approx((2e-3, 2e-3))
    assert speeds.attention_tflops(5000) == (3e-3, 3e-3)
    with pytest.raises(ValueError, match="attention must be ordered by length"):
        Arithmetic.model_validate({**speeds.model_dump(), "attention": [*reversed(rates)]})
    whole = seconds(candidate(), cluster()).parts["forward"]
    slow = seconds(candidate(), cluster(speeds={"attention": rates[:1]})).parts["forward"]
    fast = seconds(candidate(), cluster(speeds={"attention": rates[1:]})).parts["forward"]
    assert slow - whole == pytest.approx(3 * (fast - whole))


def test_speeds_between_widths_are_interpolated() -> None:
    speeds = load_cluster("h100").for_precision("bf16")
    assert speeds.product_tflops(64) == speeds.product_tflops(256)
    assert speeds.product_tflops(10**5) == speeds.product_tflops(4096)
    assert speeds.product_tflops(2048)[0] == pytest.approx(
        (speeds.product_tflops(1024)[0] + speeds.product_tflops(4096)[0]) / 2
    )
    assert speeds.covers(4096) and not speeds.covers(8192)
    with pytest.raises(ValueError, match="products must be ordered"):
        Arithmetic.model_validate({**speeds.model_dump(), "products": [*reversed(speeds.model_dump()["products"])]})


def test_zero_0_updates_all_numbers_where_they_stand() -> None:
    speeds = {"gradient_ns": 10.0, "update_ns": 20.0}
    tree = trial_tree(MODEL, "zero0", 64, 8, "fp32")
    split = seconds(candidate(), cluster(speeds=speeds)).parts["update"]
    whole = seconds(candidate(zero="zero0"), cluster(speeds={**speeds, "whole_update_ns": 3.0}), tree).parts["update"]
    assert whole / split == pytest.approx(3 / (10 * (1 + 2 / 3) + 20 / 8))
