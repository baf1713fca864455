"""Finished hypotheses of a batch, kept in tensors until the end: no row is read by itself while the search runs."""

from __future__ import annotations

import torch
from torch import Tensor

from dstrain.generation.config import BeamSearchConfig, SamplingConfig
from dstrain.generation.hypothesis import Hypothesis


def normalized_scores(totals: Tensor, lengths: Tensor, config: BeamSearchConfig | SamplingConfig) -> Tensor:
    """Summed log-probabilities as scores of hypotheses of so many tokens, EOS counted. (...), (...) -> (...)"""
    return totals / lengths**config.length_penalty if config.score == "normalized" else totals


class FinishedHypotheses:
    """Room for `capacity` finished hypotheses of each sentence, of at most `max_length` tokens, EOS included."""

    def __init__(
        self,
        config: BeamSearchConfig | SamplingConfig,
        *,
        num_sentences: int,
        capacity: int,
        max_length: int,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.count = torch.zeros(num_sentences, dtype=torch.long, device=device)
        self._config = config
        self._scores = torch.full((num_sentences, capacity), -torch.inf, device=device)
        self._lengths = torch.zeros(num_sentences, capacity, dtype=torch.long, device=device)
        self._tokens = torch.zeros(num_sentences, capacity, max_length, dtype=torch.long, device=device)
        self._totals = torch.zeros(num_sentences, capacity, max_length, device=device)

    def add(self, sentences: Tensor, finishing: Tensor, tokens: Tensor, totals: Tensor) -> None:
        """Take in the hypotheses marked in `finishing`, by column, as long as a sentence has a free slot.

        sentences: (b,) numbers within the batch; finishing: (b, n); tokens: (b, n, t) ending in EOS; totals: (b, n, t)
        log-probability of the tokens up to each.
        """
        slots = self.count[sentences, None] + finishing.cumsum(1) - 1  # (b, n)
        rows, columns = (finishing & (slots < self.capacity)).nonzero(as_tuple=True)
        where = sentences[rows], slots[rows, columns]
        width = tokens.shape[2]
        self._lengths[where] = width
        self._scores[where] = normalized_scores(totals[rows, columns, -1], self._lengths[where], self._config)
        self._tokens[(*where, slice(width))] = tokens[rows, columns]
        self._totals[(*where, slice(width))] = totals[rows, columns]
        self.count[sentences] = (self.count[sentences] + finishing.sum(1)).clamp_max(self.capacity)

    def is_full(self, sentences: Tensor) -> Tensor:
        """Which of these sentences are full. (b,) -> (b,)"""
        return self.count[sentences] >= self.capacity

    def least(self, sentences: Tensor) -> Tensor:
        """The score that a further hypothesis must exceed to be one of the `num_best`; -inf if there is room. (b,) -> (b,)"""
        return self._scores[sentences].topk(self._config.num_best, dim=1).values[:, -1]

    def best(self) -> list[list[Hypothesis]]:
        """The `num_best` hypotheses of each sentence, best first; fewer where fewer were found."""
        token_scores = self._totals.diff(dim=2, prepend=torch.zeros_like(self._totals[:, :, :1]))
        everything = zip(
            *(x.tolist() for x in (self.count, self._lengths, self._tokens, self._scores, token_scores)), strict=True
        )
        ranked = []
        for count, lengths, tokens, values, parts in everything:
            order = sorted(range(count), key=lambda i: -values[i])[: self._config.num_best]
            ranked.append([Hypothesis(tokens[i][: lengths[i]], values[i], parts[i][: lengths[i]]) for i in order])
        return ranked
