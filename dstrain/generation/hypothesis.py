"""The results of a search or a sampler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hypothesis:
    """One generated sequence.

    tokens: target ids with the final EOS. score: sum of log-probabilities (nats), divided by length**length_penalty unless
    unnormalized. token_scores: log-probability of each token, EOS included.
    """

    tokens: list[int]
    score: float
    token_scores: list[float]
