"""Random numbers of examples: each is a function of (seed, epoch, example, purpose, index) and of nothing else.

So noise is the same in any batch, on any rank of any number of ranks, and after a resume.

Choice: SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014), whose i-th output is a hash of
state + i * gamma, so that one expression draws for all examples of a batch. numpy's Philox has a counter, too, but a generator
for each example costs more than the noise. The numbers do not depend on numpy's version.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dstrain.data.batching.permutation import IntArray
from dstrain.data.ragged import positions_of
from dstrain.seeding import derive_seed

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_Words = npt.NDArray[np.uint64]


class Draws:
    """Uniform numbers for a batch of examples. example_ids: (b,) lines of the data set."""

    def __init__(self, seed: int, epoch: int, example_ids: npt.NDArray[np.int64]) -> None:
        state = np.uint64(derive_seed(seed, "noise", epoch))
        self._keys = _mix(state + _GAMMA * (example_ids.astype(np.uint64) + np.uint64(1)))

    def uniform(self, purpose: int, counts: IntArray) -> npt.NDArray[np.float64]:
        """`counts` (b,) numbers for each example, (sum of counts,) in [0, 1). purpose: a number for each use, from 0."""
        states = np.repeat(self._states(purpose), counts)
        return _fractions(states + _GAMMA * (positions_of(counts).astype(np.uint64) + np.uint64(1)))

    def one(self, purpose: int) -> npt.NDArray[np.float64]:
        """One number for each example, (b,) in [0, 1): the first of `uniform`."""
        return _fractions(self._states(purpose) + _GAMMA)

    def _states(self, purpose: int) -> _Words:
        return _mix(self._keys ^ np.uint64(purpose))


def choice(values: IntArray, fractions: npt.NDArray[np.float64]) -> IntArray:
    """A value for each uniform number, all equally likely."""
    return values[(fractions * len(values)).astype(np.int64)]


def _fractions(counters: _Words) -> npt.NDArray[np.float64]:
    """The upper 53 bits of the hashes."""
    return (_mix(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(words: _Words) -> _Words:
    """SplitMix64's finalizer, modulo 2^64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
