"""A teacher's distribution over the vocabulary for n scored tokens, in the three forms in which a loss reads it.

Each is indexed by a slice of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True)
class SparseSignal:
    """The stored part of a teacher's distribution: up to k vocabulary entries per token, at the objective's temperature.

    A sampled store has counts / draws in `probs` and no tail; a top-k store leaves the rest of a token's mass in `tail`, which is
    0 if `ids` hold every entry there is. A token's `probs` and `tail` add up to 1.
    """

    ids: Tensor  # (n, k) int64, -1 where unused
    probs: Tensor  # (n, k) float32, teacher probability mass of each id, 0 where unused
    tail: Tensor  # (n,) float32, mass of all other entries together, 0 if unknown
    with_tail: bool = True  # False if the mass of other entries is unknown: then the signal gives only forward_kl

    def __getitem__(self, tokens: slice) -> SparseSignal:
        """Of some of the tokens."""
        return replace(self, ids=self.ids[tokens], probs=self.probs[tokens], tail=self.tail[tokens])


@dataclass(frozen=True)
class DenseSignal:
    """The inputs of the teachers' vocabulary projections for n scored tokens; the teachers' probabilities are averaged.

    Valid only while the projections of the teachers run: under ZeRO-3 the weights are whole no longer than that.
    """

    features: Sequence[Tensor]  # (n, E) each
    weights: Sequence[Tensor]  # (V, E) each

    def __getitem__(self, tokens: slice) -> DenseSignal:
        """Of some of the tokens."""
        return replace(self, features=[features[tokens] for features in self.features])


@dataclass(frozen=True)
class LogProbsSignal:
    """A teacher's stored log-probabilities of all vocabulary entries, in pieces that may be mapped from files, hence of numpy.

    They become the teacher's distribution at any temperature a few tokens at a time: all of them would take n x V numbers.
    """

    log_probs: Sequence[npt.NDArray[np.floating[Any]]]  # (tokens of a piece, V) each, pieces one after another; finite
    temperature: float  # the divisor of the teacher's logits

    def __getitem__(self, tokens: slice) -> LogProbsSignal:
        """Of some of the tokens; nothing is copied."""
        pieces, start = [], 0
        for piece in self.log_probs:
            if start < tokens.stop and start + len(piece) > tokens.start:
                pieces.append(piece[max(tokens.start - start, 0) : tokens.stop - start])
            start += len(piece)
        return replace(self, log_probs=pieces)


KeptSignal = SparseSignal | LogProbsSignal
Signal = DenseSignal | KeptSignal
