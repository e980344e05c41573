"""The network benchmark's own arithmetic: calibration on one run, prediction of another, and who may run it."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import grouped_aggregation as bench
import network

from m2_ds.plan.step_time import Fabric, Layout, Work, step_time

WORK = Work(16, 4, 128, 1_000_000, forward_s=0.05, forward_backward_s=0.15, update_s=0.02)


def measured(bandwidth: float, latency: float) -> bench.Rate:
    """A network that behaves as the model says."""
    fabric = Fabric(bench.RANKS_PER_NODE, bandwidth, 1e9, latency, 0.0)
    rate = bench.Rate(None, bandwidth, latency)
    for m in bench.METHODS:
        found = step_time(WORK, fabric, Layout(m.kind, bench.RANKS, m.group, m.micro_batches, m.placement))
        sent = {"features": found.feature_bytes, "gradients": found.gradient_bytes}
        rate.methods.append(
            bench.Measured(m, found.total, found.samples_per_s, 0.0, found.arithmetic, sent, found.feature_bytes)
        )
    return rate


def test_the_model_recovers_what_it_was_calibrated_on() -> None:
    free, slow = measured(1e9, 0.0), measured(25e6, 1e-4)
    work = bench.calibrated(free)
    assert work.forward_backward_s == pytest.approx(0.15) and work.update_s == pytest.approx(0.02)
    assert work.parameters == pytest.approx(1e6)
    for method in bench.METHODS:
        found = bench.predicted(work, slow, free, method)
        wanted = next(m for m in slow.methods if m.method == method)
        assert found.samples_per_s == pytest.approx(wanted.samples_per_s, rel=1e-6)
    text = "\n".join(bench.table([free, slow], work))
    assert text.count("| global ITC | 128 |") == 2 and "+0% |" in text


def test_the_prediction_for_clusters_says_where_the_gain_ends() -> None:
    rows = [line.split(" | ") for line in list(bench.clusters())[1:]]
    gains = {(row[0].strip("| "), row[2]): float(row[8].split()[0]) for row in rows}
    for model in bench.MICRO_BATCHES:
        by_fabric = [gains[model, fabric] for fabric in bench.FABRICS]
        assert by_fabric == sorted(by_fabric)  # slower links, more to win
        assert by_fabric[0] < 1 < by_fabric[-1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may make namespaces")
def test_without_root_it_is_refused() -> None:
    with pytest.raises(ValueError, match="network namespaces need root"), network.nodes(2, 100):
        pass
