"""Random orders of examples that lie in shards: over all of them, or near their shard, so that few shards are read at a time.

Choice: the shards are put in random order, and their examples, shard after shard, moved twice: within blocks of half a window,
then within blocks that are shifted by half a block, so that no boundary is left over which nothing moves. Both moves are computed
permutations: any part of the order is had without the rest, without any state, in the memory of that part. The manner, not the
algorithm, is that of `py1e` in MosaicML's Streaming, which shifts every example at random and sorts anew.

Cost: twice that of a `Permutation`, about 0.2 s per million examples. A window of the plan reads the
shards that its examples fill, and 1.5 windows of shards around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from dstrain.data.batching.permutation import IntArray, Permutation
from dstrain.data.shuffling import ExampleShuffle, ShardWindowShuffle, ShuffleConfig
from dstrain.seeding import derive_seed

MIN_BLOCK = 4096
"""Examples. The tables of smaller permutations would cost more than the elements."""


class RandomOrder(Protocol):
    """A bijection of 0..n-1."""

    def elements(self, start: int, stop: int) -> IntArray:
        """The elements at positions start..stop-1; (stop - start,)."""
        ...


Shuffle = Callable[[Sequence[range], int], RandomOrder]
"""(adjacent lines of one shard each, seed) -> an order of all these lines, counted in the order of the ranges."""


class WindowedPermutation:
    """A random order in which an element moves, from its shard's random position on, by less than a window.

    sizes: (n,) of the shards. shards: of the window, each of mean size.
    """

    def __init__(self, sizes: IntArray, shards: int, seed: int) -> None:
        self.size = int(sizes.sum())
        self._seed = seed
        self._block = max(-(-self.size * shards // (2 * len(sizes))), MIN_BLOCK)
        order = Permutation(len(sizes), derive_seed(seed, "shards")).elements(0, len(sizes))
        starts = np.cumsum(sizes) - sizes
        self._ends = np.cumsum(sizes[order])
        self._shifts = starts[order] - (self._ends - sizes[order])  # from a position shard after shard to the element

    def elements(self, start: int, stop: int) -> IntArray:
        """The elements at positions start..stop-1."""
        positions = np.arange(start, stop)
        for purpose, shift in (("shifted blocks", self._block // 2), ("blocks", 0)):
            positions = self._moved(positions, purpose, shift)
        return positions + self._shifts[self._ends.searchsorted(positions, "right")]

    def _moved(self, positions: IntArray, purpose: str, shift: int) -> IntArray:
        """Each position within its block; blocks begin at multiples of the block less `shift`."""
        blocks = (positions + shift) // self._block
        order = np.argsort(blocks, kind="stable")
        moved = np.empty_like(positions)
        for part in np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1) if len(order) else ():
            block = int(blocks[part[0]])
            first = max(block * self._block - shift, 0)
            last = min((block + 1) * self._block - shift, self.size)
            permutation = Permutation(last - first, derive_seed(self._seed, purpose, block))
            moved[part] = first + permutation.of(positions[part] - first)
        return moved


def shuffle_all(ranges: Sequence[range], seed: int) -> Permutation:
    """All lines at random."""
    return Permutation(sum(map(len, ranges)), seed)


def build_shuffle(config: ShuffleConfig) -> Shuffle:
    """The orders of a recipe."""
    match config:
        case ExampleShuffle():
            return shuffle_all
        case ShardWindowShuffle(shards=shards):
            return partial(_shuffle_near, shards)


def _shuffle_near(shards: int, ranges: Sequence[range], seed: int) -> WindowedPermutation:
    return WindowedPermutation(np.array(list(map(len, ranges)), np.int64), shards, seed)
