"""What every task is: texts to sources and targets, and their lengths without reading a text."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from dstrain.data.batching.permutation import IntArray
from dstrain.data.ragged import Ragged
from dstrain.data.tasks.draws import Draws


class MostTokens(NamedTuple):
    """The most tokens that a text can become: of the source, of the target, of both together."""

    source: int
    target: int
    both: int


class ExampleTask(Protocol):
    """Pure functions of texts and `Draws`. No text and no length here counts the final EOS."""

    def __call__(self, texts: Ragged, draws: Draws) -> tuple[Ragged, Ragged]:
        """Sources and targets of b texts."""
        ...

    def lengths(self, lengths: IntArray, draws: Draws) -> tuple[IntArray, IntArray]:
        """Tokens of each source, or as many as it has at most, and of each target, exactly; all (b,)."""
        ...

    def longest(self, length: int) -> MostTokens:
        """The most that any text of at most `length` tokens becomes."""
        ...


class PrefixTask:
    """1 to n - 1 tokens of a text of n are the source, all equally likely, the rest is the target; a lone token has no source."""

    def __call__(self, texts: Ragged, draws: Draws) -> tuple[Ragged, Ragged]:
        """Beginnings and rests."""
        sources, targets = self.lengths(texts.lengths, draws)
        is_source = np.repeat(np.tile([True, False], len(sources)), np.column_stack((sources, targets)).ravel())
        return texts.select(is_source), texts.select(~is_source)

    def lengths(self, lengths: IntArray, draws: Draws) -> tuple[IntArray, IntArray]:
        """Both are exact."""
        sources = np.where(lengths > 1, 1 + (draws.one(0) * (lengths - 1)).astype(np.int64), 0)
        return sources, lengths - sources

    def longest(self, length: int) -> MostTokens:
        """Either side may be nearly all of it."""
        return MostTokens(length - 1, max(length - 1, 1), length)
