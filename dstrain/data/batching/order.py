"""The order of an epoch's examples, window by window: each of them once, or corpora mixed by shares.

Choice: an order is a function of (seed, epoch, window): any window is had without those before it, and resuming needs no state.
Memory is one window; the number of ranks plays no part.

A mixture draws from each corpus in a random order of its own, without repetition until the corpus is used up, then in another.
Its epoch is a number of examples, of which each corpus gives its share; how many have been drawn before an epoch follows from the
shares of the epochs before. Each window takes an even part of what each corpus gives, and shuffles the parts together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from dstrain.data.batching.permutation import IntArray, Permutation
from dstrain.data.batching.shard_window import Shuffle, shuffle_all
from dstrain.data.lengths import ExampleLengths
from dstrain.data.sampling import Phase
from dstrain.errors import DataError
from dstrain.seeding import derive_seed


class Order(Protocol):
    """The examples of every epoch."""

    @property
    def num_windows(self) -> int:
        """Of each epoch."""
        ...

    def window(self, epoch: int, number: int) -> IntArray:
        """The examples of one window in random order; (n,) lines of the data set."""
        ...

    def key(self, number: int) -> int:
        """Tells apart the seeds of what is drawn within a window."""
        ...

    def num_targets(self, lengths: ExampleLengths) -> int:
        """Target tokens of an epoch, or about so many."""
        ...


class ShuffledOrder:
    """Every example once an epoch. shards: the lines of each, from 0 on; capacity: of a window."""

    def __init__(self, shards: Sequence[range], capacity: int, seed: int, *, shuffle: Shuffle = shuffle_all) -> None:
        self.num_examples = sum(map(len, shards))
        self.num_windows = -(-self.num_examples // capacity)
        self.seed = seed
        self._shards = shards
        self._shuffle = shuffle

    def window(self, epoch: int, number: int) -> IntArray:
        """As `Order`."""
        order = self._shuffle(self._shards, derive_seed(self.seed, "order", epoch))
        return order.elements(self.key(number), self.key(number + 1))

    def key(self, number: int) -> int:
        """The position at which the window begins."""
        return self.num_examples * number // self.num_windows

    def num_targets(self, lengths: ExampleLengths) -> int:
        """All there are."""
        return lengths.num_targets(1)


class CorpusStream:
    """A corpus in random order again and again. ranges: its lines, by shard."""

    def __init__(self, name: str, ranges: Sequence[range], seed: int, *, shuffle: Shuffle = shuffle_all) -> None:
        self.name = name
        self.ranges = ranges
        self.seed = seed
        self._shuffle = shuffle
        self._ends = np.cumsum([len(part) for part in ranges], dtype=np.int64)
        self._offsets = np.array([part.stop for part in ranges], np.int64) - self._ends
        self.size = int(self._ends[-1])

    def lines(self, start: int, stop: int) -> IntArray:
        """Those at positions start..stop-1 of the endless stream."""
        pieces = []
        for lap in range(start // self.size, -(-stop // self.size)):
            first = lap * self.size
            order = self._shuffle(self.ranges, derive_seed(self.seed, f"corpus {self.name}", lap))
            pieces.append(order.elements(max(start - first, 0), min(stop - first, self.size)))
        elements = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
        lines: IntArray = elements + self._offsets[self._ends.searchsorted(elements, "right")]
        return lines


class MixedOrder:
    """Corpora by shares. corpora: the lines of each, by shard. num_examples: of an epoch. capacity: of a window, or about that.

    Raises DataError for a corpus that has a share and no example, or less than one example an epoch.
    """

    def __init__(
        self,
        corpora: Mapping[str, Sequence[range]],
        phases: Sequence[Phase],
        *,
        num_examples: int,
        capacity: int,
        seed: int,
        shuffle: Shuffle = shuffle_all,
    ) -> None:
        self.num_examples = num_examples
        self.num_windows = -(-num_examples // capacity)
        self.seed = seed
        drawn = [name for name in corpora if any(phase.shares[name] for phase in phases)]
        for name in drawn:
            if not any(map(len, corpora[name])):
                raise DataError(
                    f"no example of the corpus {name} is in the training split, but batching.sampling draws from it; look at the "
                    "counts of dropped pairs in the manifest, or leave the corpus out"
                )
        self._streams = [CorpusStream(name, corpora[name], seed, shuffle=shuffle) for name in drawn]
        self._starts = [phase.from_epoch for phase in phases]
        self._counts = [_apportioned([phase.shares[name] for name in drawn], num_examples) for phase in phases]
        for phase, counts in zip(phases, self._counts, strict=True):
            for name, count in zip(drawn, counts, strict=True):
                if phase.shares[name] and not count:
                    raise DataError(
                        f"the share of the corpus {name}, {phase.shares[name]:.2g}, is less than one of the {num_examples:,} "
                        "examples of an epoch: raise its weight, or batching.sampling.examples_per_epoch"
                    )

    def window(self, epoch: int, number: int) -> IntArray:
        """As `Order`."""
        counts, total = self._counts_of(epoch), self.num_windows
        parts = [
            stream.lines(before + count * number // total, before + count * (number + 1) // total)
            for stream, before, count in zip(self._streams, self._drawn_before(epoch), counts, strict=True)
        ]
        lines = np.concatenate(parts)
        return lines[Permutation(len(lines), derive_seed(self.seed, "mixture", epoch, number)).elements(0, len(lines))]

    def key(self, number: int) -> int:
        """The number."""
        return number

    def num_targets(self, lengths: ExampleLengths) -> int:
        """By the first window, which holds an even part of every corpus."""
        window = self.window(1, 0)
        return int(lengths.of(1, window)[1].sum(dtype=np.int64)) * self.num_examples // len(window)

    def _counts_of(self, epoch: int) -> list[int]:
        """Examples of each corpus in an epoch."""
        latest = max([0, *(number for number, start in enumerate(self._starts) if start <= epoch)])
        return self._counts[latest]

    def _drawn_before(self, epoch: int) -> list[int]:
        """Examples of each corpus in all epochs from 1 on before this one."""
        ends = [*self._starts[1:], epoch]
        epochs = [max(min(end, epoch) - start, 0) for start, end in zip(self._starts, ends, strict=True)]
        drawn: list[int] = (np.array(epochs) @ np.array(self._counts)).tolist()
        return drawn


def _apportioned(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`, each less than one from its share of it; the largest remainders are rounded up."""
    exact = [share * total for share in shares]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts
