"""The order of the stream: exact mixtures, whole epochs, real shuffling, and no dependence on how it is asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_ds.data import randomness
from m2_ds.data.order import Order, SourceOrder, window_counts

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, groups=st.integers(1, 5), seed=st.integers(0, 5))
def test_every_row_once_an_epoch(sizes: list[int], groups: int, seed: int) -> None:
    order = SourceOrder(sizes, seed=seed, source=0, groups=groups)
    epochs, rows = order(np.arange(3 * order.rows))
    for epoch in range(3):
        assert sorted(rows[epochs == epoch].tolist()) == list(range(order.rows))


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(st.tuples(sizes, st.floats(0.5, 5)), min_size=1, max_size=4),
    window=st.integers(16, 64),
    seed=st.integers(0, 3),
    start=st.integers(0, 500),
)
def test_mixture_is_exact_in_every_window(
    sources: list[tuple[list[int], float]], window: int, seed: int, start: int
) -> None:
    weights = [weight for _, weight in sources]
    order = Order([s for s, _ in sources], weights, seed=seed, window=window, groups=3)
    for number in (0, 1, start):
        places = order(np.arange(number * window, (number + 1) * window))
        counts = np.bincount(places.source, minlength=len(sources))
        assert counts.tolist() == window_counts(weights, window).tolist()
        assert np.abs(counts - np.array(weights) / sum(weights) * window).max() < 1


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(1, 5), min_size=1, max_size=3),
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 3),
)
def test_asking_in_parts_or_backwards_changes_nothing(weights: list[float], parts: list[int], seed: int) -> None:
    def make() -> Order:
        return Order([[5, 3, 8], [4] * 6, [9]][: len(weights)], weights, seed=seed, window=32, groups=2)

    slots = np.arange(sum(parts))
    whole = make()(slots)
    order, pieces = make(), np.split(slots, np.cumsum(parts)[:-1])
    backwards = [order(piece) for piece in reversed(pieces)][::-1]
    for field in range(3):
        assert np.concatenate([piece[field] for piece in backwards]).tolist() == whole[field].tolist()


def test_rows_of_a_source_come_once_an_epoch_through_the_mixture() -> None:
    order = Order([[10] * 10, [10] * 3], [3.0, 1.0], seed=1, window=40, groups=4)
    places = order(np.arange(400))
    first = places.row[(places.source == 0) & (places.epoch == 0)]
    assert sorted(first.tolist()) == list(range(100))


def test_seeds_epochs_and_sources_are_shuffled_differently() -> None:
    def rows(seed: int, source: int, epoch: int) -> list[int]:
        return SourceOrder([50] * 4, seed=seed, source=source, groups=2)(np.arange(200) + 200 * epoch)[1].tolist()

    orders = [rows(0, 0, 0), rows(1, 0, 0), rows(0, 1, 0), rows(0, 0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(order != sorted(order) for order in orders)


@pytest.mark.parametrize("sizes", [[200], [1] * 200], ids=["rows", "row groups"])
def test_rows_and_row_groups_are_both_shuffled_anew(sizes: list[int]) -> None:
    def rows(seed: int, source: int, epoch: int) -> tuple[int, ...]:
        order = SourceOrder(sizes, seed=seed, source=source, groups=1)
        return tuple(order(np.arange(200) + 200 * epoch)[1].tolist())

    assert len({rows(0, 0, 0), rows(1, 0, 0), rows(0, 1, 0), rows(0, 0, 1)}) == 4


def test_mixing_windows_are_shuffled_differently() -> None:
    order = Order([[50], [50]], [1, 1], seed=0, window=64, groups=1)
    assert len({tuple(order(np.arange(64) + 64 * k).source.tolist()) for k in range(10)}) == 10


def test_shuffling_stays_within_a_few_row_groups_but_mixes_them() -> None:
    order = SourceOrder([50] * 20, seed=0, source=0, groups=5)
    _, rows = order(np.arange(1000))
    for run in range(4):
        assert len(set((rows[run * 250 : (run + 1) * 250] // 50).tolist())) == 5
    # Neighbours on disk are far apart in the stream: a run is mixed as a whole, not group by group.
    assert len(set((rows[:20] // 50).tolist())) >= 3


def test_too_small_a_weight_and_an_empty_source_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sources\.1.*at least 1001"):
        window_counts([1000.0, 1.0], 100)
    with pytest.raises(ValueError, match=r"sources\.1 has no rows"):
        Order([[3], []], [1, 1], seed=0, window=8, groups=1)


def test_hash_is_the_same_everywhere_and_even() -> None:
    # SplitMix64's known outputs for seed 0: the finaliser is the published one.
    assert int(randomness._mix(np.array([0], dtype=np.uint64))[0]) == 0xE220A8397B1DCDAF
    assert randomness.hashed(3, 2, np.arange(3), 5).tolist() == [int(randomness.hashed(3, 2, k, 5)) for k in range(3)]
    values = randomness.uniform(0, 1, np.arange(100_000))
    assert abs(values.mean() - 0.5) < 0.005
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert np.abs(counts - 5000).max() < 5 * np.sqrt(5000)
    neighbours = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(neighbours) < 0.02
    order = randomness.permutation(1000, 0, 1, 7)
    assert sorted(order.tolist()) == list(range(1000))
