"""Random decisions inside the network as a pure function of (seed, sample, layer): no generator, no hidden state.

A sample carries a 64-bit key made of the run's seed and its place in the global stream. Every decision about it hashes
that key with the number of the decision, so numbers are equal for any number of ranks, in a repeated forward
(activation checkpointing, the two passes of an accumulated step) and after a restart. Legend: B samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed 64-bit number
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The SplitMix64 finaliser (Steele, Lea, Flood 2014) on int64 tensors; multiplication wraps."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


@dataclass(frozen=True)
class Noise:
    """The random numbers of a batch. ``keys``: int64 [B], one a sample."""

    keys: Tensor

    @classmethod
    def of(cls, seed: int, slots: Tensor, view: int = 0) -> "Noise":
        """Keys for samples at ``slots`` (int64 [B]) of the stream; ``view`` tells apart tensors of one sample."""
        return cls(mix(mix(slots + mix(torch.tensor(seed, device=slots.device))) + view))

    def uniform(self, decision: int, count: int = 1) -> Tensor:
        """float32 [B, count] in [0, 1) for one numbered decision."""
        lanes = torch.arange(count, device=self.keys.device)
        bits = mix(mix(self.keys + decision * 1_000_003)[:, None] + lanes)
        return _shift(bits, 40).to(torch.float32) * 2.0**-24
