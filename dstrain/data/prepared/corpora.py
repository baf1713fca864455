"""Which corpus each row of a split comes from: runs of neighboring rows, as the manifest has them.

A corpus is known by its number in the split's list of the recipe. It is one run of rows in plain data, and may be several in data
that was made from other data. Names group corpora: entries of one name are one corpus to sampling, losses and scores.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

import numpy as np

from dstrain.data.batching.permutation import IntArray
from dstrain.storage.document import Count

CorpusRun = tuple[Count, Count]
"""The number of a corpus, and how many rows of it follow."""


def merged_runs(runs: Iterable[CorpusRun]) -> list[CorpusRun]:
    """The same rows in the fewest runs; none is empty."""
    filled = (run for run in runs if run[1])
    return [(corpus, sum(rows for _, rows in group)) for corpus, group in groupby(filled, key=lambda run: run[0])]


def split_at_shards(ranges: Iterable[range], shards: Sequence[range]) -> list[range]:
    """The same rows in their order, in ranges of one shard each. shards: adjacent rows from 0 on."""
    ends = [shard.stop for shard in shards]
    parts = []
    for rows in ranges:
        first, last = bisect_right(ends, rows.start), bisect_left(ends, rows.stop)
        bounds = [rows.start, *ends[first:last], rows.stop]
        parts += [range(start, stop) for start, stop in pairwise(bounds) if start < stop]
    return parts


class CorpusRanges:
    """Looks up corpora by row, and rows by corpus."""

    def __init__(self, runs: Iterable[CorpusRun]) -> None:
        merged = merged_runs(runs)
        self._corpora = np.array([corpus for corpus, _ in merged], np.int64)
        self._ends = np.cumsum([rows for _, rows in merged], dtype=np.int64)

    def of(self, rows: IntArray) -> IntArray:
        """The corpus of each row. (n,) -> (n,)"""
        return self._corpora[self._ends.searchsorted(rows, "right")]

    def rows(self, corpora: Iterable[int]) -> list[range]:
        """The rows of these corpora together, ascending."""
        starts = [0, *self._ends[:-1].tolist()]
        requested = np.isin(self._corpora, list(corpora)).tolist()
        return [range(start, end) for start, end, here in zip(starts, self._ends.tolist(), requested, strict=True) if here]


class NamedCorpora:
    """The corpora of a split by their names. names: of each entry of the recipe's list; equal names are one corpus."""

    def __init__(self, names: Sequence[str], ranges: CorpusRanges) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._ranges = ranges
        self._of_entry = np.array([self.names.index(name) for name in names], np.int64)

    def of(self, rows: IntArray) -> IntArray:
        """Index into `names` of each row. (n,) -> (n,)"""
        return self._of_entry[self._ranges.of(rows)]

    def rows(self, name: str) -> list[range]:
        """The rows of a name, ascending."""
        return self._ranges.rows(np.flatnonzero(self._of_entry == self.names.index(name)).tolist())
