"""Random numbers as a pure function of counters: no state to save, the same on every machine and library version.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014),
applied once a counter. `stream` keeps uses apart that would otherwise share counters.
"""

from typing import TypeAlias

import numpy as np

Counter: TypeAlias = int | np.ndarray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)

# One number a use; never reuse one.
MIXING, BLOCKS, ROWS, CAPTION, IMAGE, SUBSTITUTE, SCENE = range(1, 8)


def hashed(seed: int, stream: int, *counters: Counter) -> np.ndarray:
    """uint64 hashes of (seed, stream, counters); counters broadcast against each other."""
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed) * _GOLDEN + np.uint64(stream))
        for counter in counters:
            state = _mix(state ^ _mix(np.asarray(counter).astype(np.uint64) + _GOLDEN))
    return np.asarray(state)


def _mix(state: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


def uniform(seed: int, stream: int, *counters: Counter) -> np.ndarray:
    """float64 in [0, 1), one for each hash."""
    return (hashed(seed, stream, *counters) >> np.uint64(11)) * 2.0**-53


def permutation(n: int, seed: int, stream: int, *counters: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n]."""
    return np.argsort(hashed(seed, stream, *counters, np.arange(n)), kind="stable")
