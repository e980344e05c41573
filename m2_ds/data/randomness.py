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

_CHUNK = 1 << 15


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
    """A permutation of 0..n-1, int64 [n]: by hashes, of which the last bits are replaced by the number itself.

    So no two are equal and any sorting algorithm gives the same: numpy's fastest does, in a quarter of the time of a
    stable one.
    """
    mask = np.uint64((1 << max(0, n - 1).bit_length()) - 1)
    keys = np.empty(n, dtype=np.uint64)
    for first in range(0, n, _CHUNK):  # pieces that stay in the processor's cache
        numbers = np.arange(first, min(n, first + _CHUNK), dtype=np.uint64)
        keys[first : first + _CHUNK] = (hashed(seed, stream, *counters, numbers) & ~mask) | numbers
    keys.sort()
    keys &= mask
    return keys.view(np.int64)
