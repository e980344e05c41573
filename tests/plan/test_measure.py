"""From times to speeds: what was timed is predicted again; and a measurement of this machine (slow)."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from m2_ds.model.config import M2EncoderConfig
from m2_ds.plan.cluster import Arithmetic, Cluster, load_cluster
from m2_ds.plan.measure import _arithmetic, _link, measure_machine
from m2_ds.plan.measure_rank import DEPTH, HEAD, HEADS, LARGE, LENGTH, LENGTHS, SAMPLES, SMALL, WIDTHS
from m2_ds.plan.time import _seconds
from m2_ds.plan.work import Tokens, layer_work


def times() -> dict[str, Any]:
    """A machine of 100 GFLOP/s whose layers take half as long again as their products."""
    products = {}
    for width in WIDTHS:
        once = 24 * width**2 * SAMPLES * LENGTH / 1e11
        products[str(width)] = {"forward": once, "backward": 2 * once}
    layers = {width: {side: 1.5 * s for side, s in both.items()} for width, both in products.items()}
    return {
        "products": products,
        "layers": layers,
        "attention": {str(length): {"forward": 1e-4, "backward": 2e-4} for length in LENGTHS},
        "dispatch": {"forward": 1e-5, "backward": 2e-5},
        "gradient_s": 1e-9,
        "update_s": 5e-9,
    }


def test_a_layer_that_was_timed_is_predicted() -> None:
    given = times()
    speeds = Arithmetic.model_validate(_arithmetic(given, 4))
    assert speeds.products[0].forward_tflops == pytest.approx(0.1)
    for width in WIDTHS[1:]:
        config = M2EncoderConfig(hidden_size=width, num_heads=width // HEAD, num_layers=DEPTH)
        work = layer_work(config, Tokens(SAMPLES, LENGTH, SAMPLES * LENGTH), 4)
        forward, backward = _seconds(work, speeds, width, False)
        assert forward == pytest.approx(given["layers"][str(width)]["forward"], rel=0.2)
        assert backward == pytest.approx(given["layers"][str(width)]["backward"], rel=0.2)
    attention = 4 * SAMPLES * LENGTH**2 * HEADS * HEAD
    assert speeds.attention_tflops(LENGTH)[0] == pytest.approx(attention / 1e-4 / 1e12, rel=0.01)
    assert (speeds.gradient_ns, speeds.update_ns) == (1, 5)


def test_links_have_the_speed_of_the_fastest_collective() -> None:
    large = {"all_reduce": 0.016, "all_reduce_bf16": 0.032, "all_gather": 0.008, "reduce_scatter": 0.016, "send": 0.016}
    small = {"all_reduce": 2e-4, "all_gather": 1e-4, "send": 3e-4, "all_reduce_bf16": 1, "reduce_scatter": 1}
    found = _link({str(LARGE): large, str(SMALL): small}, 2)
    assert found["bandwidth_gbs"] == pytest.approx(4 * LARGE / 0.008 / 1e9)
    assert found["shares"] == {
        "all_reduce": 0.5, "all_reduce_bf16": 0.25, "all_gather": 1.0, "reduce_scatter": 0.25, "send": 1.0,
    }  # fmt: skip
    assert found["latency_us"] == pytest.approx(100)


def test_more_processes_than_cores_are_refused() -> None:
    with pytest.raises(ValueError, match="cores"):
        measure_machine(ranks=10_000)


def test_a_measured_machine_is_planned_with_as_many_ranks_as_it_was_measured_with(tmp_path: Path) -> None:
    speeds = _arithmetic(times(), 4)
    link = {"bandwidth_gbs": 1, "latency_us": 50}
    tree = {
        "name": "here", "basis": "measured", "device": "cpu", "ranks_per_node": 2, "memory_gb": 8, "reserve_gb": 0.1,
        "arithmetic": {"fp32": speeds}, "intra": link, "inter": link,
        "at_fewer_ranks": [{"ranks": 1, "arithmetic": {"fp32": {**speeds, "step_ms": 7.0}}}],
    }  # fmt: skip
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(tree))
    cluster = load_cluster(str(path))
    alone = cluster.with_size(None, 1)
    assert (alone.ranks, alone.memory_gb, alone.for_precision("fp32").step_ms) == (1, 16, 7.0)
    with pytest.raises(ValueError, match="measured with 1, 2 rank"):
        cluster.with_size(None, 4)
    with pytest.raises(ValueError, match="no speeds for engine.precision bf16"):
        cluster.for_precision("bf16")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_this_machine_is_measured() -> None:
    cluster = Cluster.model_validate(yaml.safe_load(measure_machine(ranks=1, budget_s=0.1)))
    assert cluster.basis == "measured" and cluster.ranks == 1
    for speeds in cluster.arithmetic.values():
        assert speeds.products[-1].forward_tflops > 1e-3 and speeds.update_ns > 0.1
    assert 0 <= cluster.reserve_gb < 0.5
