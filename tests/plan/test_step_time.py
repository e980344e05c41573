"""The step-time model: its bytes are the collectives' own, and its times follow from rings by hand."""

import pytest

from m2_ds.plan.step_time import Fabric, Layout, Method, Work, step_time

WORK = Work(micro_batch=16, matrices=4, embed_dim=128, parameters=1e6, forward_s=1, forward_backward_s=3, update_s=0.5)
FABRIC = Fabric(2, inter_bandwidth=1e6, intra_bandwidth=1e8, inter_latency=1e-3, intra_latency=0.0)
OWN = 16 * 4 * 128 * 4


def test_bytes_are_those_of_the_formulas() -> None:
    """4 k (N-1) b d e; 2 (g-1) k b d e + 8 (g-1) k b; 4 k^2 (N-1) b d e, each for two levels."""
    b, d, e, levels, n = 16, 128, 4, 2, 8
    for k in (1, 4, 8):
        for g in (1, 2, 8):
            exact = levels * (2 * (g - 1) * k * b * d * e + 8 * (g - 1) * k * b)
            assert step_time(WORK, FABRIC, Layout("grouped", n, g, k)).feature_bytes == exact
        regather = step_time(WORK, FABRIC, Layout("regather", n, n, k)).feature_bytes
        assert regather == levels * 4 * k**2 * (n - 1) * b * d * e
        # At the same contrastive batch: at least 8 times fewer bytes in the loss from k = 8 on.
        if k == 8:
            assert regather / step_time(WORK, FABRIC, Layout("grouped", n, n, k)).feature_bytes > 8
    assert step_time(WORK, FABRIC, Layout("global", n, n, 1)).feature_bytes == levels * 4 * (n - 1) * b * d * e


@pytest.mark.parametrize(
    ("method", "k", "seconds"),
    [("global", 1, 3.5), ("global", 4, 14.0), ("grouped", 1, 3.5), ("grouped", 4, 15.5), ("regather", 4, 16.5)],
)
def test_arithmetic_counts_second_forwards(method: Method, k: int, seconds: float) -> None:
    assert step_time(WORK, FABRIC, Layout(method, 8, 8, k)).arithmetic == seconds


def test_times_follow_the_slowest_edge_of_a_ring() -> None:
    inside = step_time(WORK, FABRIC, Layout("grouped", 8, 2, 1)).features
    assert inside == pytest.approx((OWN + 16 * 16) / 1e8)
    across = step_time(WORK, FABRIC, Layout("grouped", 8, 4, 1)).features
    assert across == pytest.approx(3 * ((OWN + 16 * 16) / 1e6 + 2e-3))
    strided = step_time(WORK, FABRIC, Layout("grouped", 8, 4, 1, "strided")).features
    assert strided == pytest.approx(3 * ((OWN + 16 * 16) / 0.5e6 + 2e-3))
    gradients = step_time(WORK, FABRIC, Layout("grouped", 8, 1, 4)).gradients
    assert gradients == pytest.approx(2 * 7 * (4e6 / 8 / 1e6 + 1e-3))
    assert step_time(WORK, FABRIC, Layout("global", 8, 8, 4)).gradients == pytest.approx(4 * gradients)
    alone = step_time(WORK, FABRIC, Layout("grouped", 1, 1, 2))
    assert (alone.features, alone.gradients, alone.pairs) == (0, 0, 32)
    assert alone.samples_per_s == pytest.approx(32 / 7.5)
