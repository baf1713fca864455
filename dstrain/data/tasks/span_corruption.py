"""T5's span corruption: random spans of a text, and the text with a sentinel in the place of each.

Difference from Raffel et al. 2020: a text may begin or end with a span. Theirs always end with one, which in a line with a single
span would leave nothing but the end to be predicted. As there, the target has no sentinel behind the last span.
"""

from __future__ import annotations

from enum import IntEnum, auto

import numpy as np
import numpy.typing as npt

from dstrain.data.batching.permutation import IntArray
from dstrain.data.ragged import Ragged, positions_of, replace_runs, smallest, starts_of
from dstrain.data.tasks.config import SpanCorruption
from dstrain.data.tasks.draws import Draws
from dstrain.data.tasks.symbols import Symbols
from dstrain.data.tasks.task import MostTokens
from dstrain.errors import DataError


class SpanDraw(IntEnum):
    """Purposes of `Draws`."""

    SPANS = 0
    STAYS = auto()


class SpanCorruptionTask:
    """`stays <0> stays <1> stays` is the source, `<0> span <1> span` the target. A text of one token has no span."""

    def __init__(self, config: SpanCorruption, symbols: Symbols) -> None:
        self.config = config
        self._key = symbols.key
        self._sentinels = symbols.numbered(config.sentinels)

    def __call__(self, texts: Ragged, draws: Draws) -> tuple[Ragged, Ragged]:
        """Texts without their spans, and the spans."""
        noise, spans = self._counts(texts.lengths)
        span_lengths = random_parts(noise, spans, draws.uniform(SpanDraw.SPANS, noise))
        stays = texts.lengths - noise + 2  # what stays before the first span and after the last one may be empty
        stay_lengths = random_parts(stays, spans + 1, draws.uniform(SpanDraw.STAYS, stays))
        stay_lengths[starts_of(spans + 1)] -= 1
        stay_lengths[np.cumsum(spans + 1) - 1] -= 1
        is_span = positions_of(2 * spans + 1) % 2 == 1  # of the runs of a text
        runs = np.empty(len(is_span), np.int64)
        runs[is_span], runs[~is_span] = span_lengths, stay_lengths
        sentinels = self._sentinels[positions_of(spans)]
        source, _ = replace_runs(texts.tokens, runs, is_span, sentinels)
        target = np.insert(texts.tokens[np.repeat(is_span, runs)], starts_of(span_lengths), sentinels)
        return Ragged(source, texts.lengths - noise + spans), Ragged(target, noise + spans)

    def lengths(self, lengths: IntArray, draws: Draws) -> tuple[IntArray, IntArray]:
        """Both are exact, and depend on nothing else."""
        noise, spans = self._counts(lengths)
        return lengths - noise + spans, noise + spans

    def longest(self, length: int) -> MostTokens:
        """As `lengths`. Raises DataError if such a text has more spans than the tokenizer has sentinels."""
        noise, spans = (int(counts[0]) for counts in self._counts(np.array([length])))
        if spans > len(self._sentinels):
            own = len(self._sentinels)
            raise DataError(
                f"{self._key}: a text of {length:,} tokens has {spans} spans, but the tokenizer only {own} sentinels: name them "
                f"up to {self.config.sentinel(spans - 1)} in data.tokenizer.user_symbols, raise mean_span_length, or lower "
                "data.filter.max_target_length, and prepare again"
            )
        return MostTokens(length - noise + spans, noise + spans, length + 2 * spans)

    def _counts(self, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """Tokens in spans, and spans, of texts by their lengths; at least one token stays, and one between two spans."""
        noise = np.round(self.config.noise_density * lengths).astype(np.int64)
        noise = np.minimum(np.maximum(noise, 1), np.maximum(lengths - 1, 0))
        spans = np.maximum(np.round(noise / self.config.mean_span_length).astype(np.int64), 1)
        return noise, np.minimum(spans, np.minimum(noise, lengths - noise))


def random_parts(totals: IntArray, counts: IntArray, keys: npt.NDArray[np.float64]) -> IntArray:
    """`counts` (b,) positive numbers that sum to each total, all such series equally likely; (sum of counts,).

    keys: random, one for each unit of a total. A total is 0 only if its count is.
    """
    keys[starts_of(totals)[totals > 0]] = -1.0  # the first unit always begins a part
    begins = np.flatnonzero(smallest(keys, totals, counts))
    return np.diff(np.append(begins, len(keys)))
