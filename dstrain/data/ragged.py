"""Sequences of unequal lengths in one flat array, and what is done to all of them at once, without a loop over sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dstrain.data.batching.permutation import IntArray

BoolArray = npt.NDArray[np.bool_]


class Ragged(NamedTuple):
    """Sequences of unequal lengths one after another. tokens: (sum of lengths,); lengths: (b,)."""

    tokens: IntArray
    lengths: IntArray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | npt.NDArray[np.integer[Any]]]) -> Ragged:
        """Of lists or arrays of ids."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        tokens = np.concatenate(rows).astype(np.int64) if len(rows) else np.empty(0, np.int64)
        return cls(tokens, lengths)

    def rows(self) -> list[IntArray]:
        """A view of each sequence."""
        ends = np.cumsum(self.lengths).tolist()
        return [self.tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def select(self, mask: BoolArray) -> Ragged:
        """The tokens that `mask` (sum of lengths,) chooses."""
        return Ragged(self.tokens[mask], sums(mask, self.lengths))

    def with_end(self, token: int) -> Ragged:
        """Every sequence with `token` behind it."""
        ends = np.cumsum(self.lengths)
        return Ragged(np.insert(self.tokens, ends, token), self.lengths + 1)


def starts_of(lengths: IntArray) -> IntArray:
    """The start of each of a series of adjacent sequences."""
    return np.cumsum(lengths) - lengths


def positions_of(lengths: IntArray) -> IntArray:
    """0, 1, 2, ... for each of the lengths in turn."""
    return np.arange(lengths.sum()) - np.repeat(starts_of(lengths), lengths)


def segments(lengths: IntArray) -> IntArray:
    """0, 0, ..., 1, 1, ...: which of the sequences an element belongs to."""
    return np.repeat(np.arange(len(lengths)), lengths)


def sums(values: npt.NDArray[Any], lengths: IntArray) -> IntArray:
    """The sum of the values of each sequence; values: (sum of lengths,) integers or booleans."""
    totals = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    ends = np.cumsum(lengths)
    sums: IntArray = totals[ends] - totals[ends - lengths]
    return sums


def smallest(keys: npt.NDArray[np.float64], lengths: IntArray, counts: IntArray) -> BoolArray:
    """Marks the `counts` (b,) smallest keys of each sequence: a random choice without repetition, if the keys are random."""
    marks = np.empty(len(keys), np.bool_)
    marks[np.lexsort((keys, segments(lengths)))] = positions_of(lengths) < np.repeat(counts, lengths)
    return marks


def replace_runs(tokens: IntArray, runs: IntArray, replaced: BoolArray, values: IntArray) -> tuple[IntArray, IntArray]:
    """Every run that `replaced` marks as one token.

    runs: (r,) lengths of adjacent runs that make up `tokens`, 0 allowed. replaced: (r,). values: one for each replaced run.
    Returns the new tokens and the new lengths of all runs.
    """
    lengths = np.where(replaced, 1, runs)
    is_value = np.repeat(replaced, lengths)
    result = np.empty(len(is_value), np.int64)
    result[is_value] = values
    result[~is_value] = tokens[~np.repeat(replaced, runs)]
    return result, lengths
