"""A teacher's distribution over the vocabulary for n scored tokens, in the three forms in which a loss reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True)
class SparseSignal:
    """What a teacher says of n scored tokens, as far as it was kept: up to k types each, at the objective's temperature.

    A sampled store has counts / draws in `probs` and no tail; the best types of a token leave the rest of its mass in `tail`.
    Where `ids` hold every type there is, `tail` is 0. A row's `probs` and `tail` add up to 1.
    """

    ids: Tensor  # (n, k) int64, -1 where unused
    probs: Tensor  # (n, k) float32, teacher probability mass of each id, 0 where unused
    tail: Tensor  # (n,) float32, mass of all other types together, 0 where nothing is said of them
    with_tail: bool = True  # False where nothing is said of other types: then the signal teaches forward_kl alone

    def part(self, rows: slice | Tensor) -> SparseSignal:
        """Of some of the tokens, by place or by a mask."""
        return replace(self, ids=self.ids[rows], probs=self.probs[rows], tail=self.tail[rows])


@dataclass(frozen=True)
class DenseSignal:
    """What teachers say of n scored tokens, before their projections, one entry a teacher; their probabilities are averaged.

    Valid only while the projections of the teachers run: under ZeRO-3 the weights are whole no longer than that.
    """

    features: Sequence[Tensor]  # (n, E) each
    weights: Sequence[Tensor]  # (V, E) each

    def part(self, rows: slice | Tensor) -> DenseSignal:
        """Of some of the tokens, by place or by a mask."""
        return replace(self, features=[features[rows] for features in self.features])


@dataclass(frozen=True)
class LogProbsSignal:
    """All that a teacher said of n scored tokens, as it is kept: in pieces that may be parts of mapped files, hence of numpy.

    It becomes the teacher's distribution at any temperature a few rows at a time, for all of them would take n x V numbers.
    """

    log_probs: Sequence[npt.NDArray[np.floating[Any]]]  # (rows of a piece, V) each, pieces one after another; finite
    temperature: float  # what the teacher's logits were divided by

    def part(self, rows: slice | Tensor) -> LogProbsSignal:
        """Of some of the tokens, by place, where nothing is copied, or by a mask."""
        if isinstance(rows, Tensor):
            return replace(self, log_probs=[np.concatenate(self.log_probs)[rows.numpy()]])
        found, start = [], 0
        for piece in self.log_probs:
            if start < rows.stop and start + len(piece) > rows.start:
                found.append(piece[max(rows.start - start, 0) : rows.stop - start])
            start += len(piece)
        return replace(self, log_probs=found)


KeptSignal = SparseSignal | LogProbsSignal
Signal = DenseSignal | KeptSignal
