"""Finished hypotheses of a batch, kept in tensors until the end: no row is read by itself while the search runs."""

from __future__ import annotations

import torch
from torch import Tensor

from dstrain.generation.config import BeamSearchConfig, SamplingConfig
from dstrain.generation.hypothesis import Hypothesis


class FinishedHypotheses:
    """Room for `capacity` finished hypotheses of each sentence, of at most `max_length` tokens, EOS included."""

    def __init__(self, num_sentences: int, capacity: int, max_length: int, device: torch.device) -> None:
        self.capacity = capacity
        self.count = torch.zeros(num_sentences, dtype=torch.long, device=device)
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
        self._tokens[(*where, slice(width))] = tokens[rows, columns]
        self._totals[(*where, slice(width))] = totals[rows, columns]
        self.count[sentences] = (self.count[sentences] + finishing.sum(1)).clamp_max(self.capacity)

    def is_full(self, sentences: Tensor) -> Tensor:
        """Which of these sentences are full. (b,) -> (b,)"""
        return self.count[sentences] >= self.capacity

    def best(self, config: BeamSearchConfig | SamplingConfig) -> list[list[Hypothesis]]:
        """The `num_best` hypotheses of each sentence, best first; fewer where fewer were found."""
        last = (self._lengths - 1).clamp_min(0)[:, :, None]
        scores = self._totals.gather(2, last)[:, :, 0]  # (B, C)
        if config.score == "normalized":
            scores = scores / self._lengths.clamp_min(1) ** config.length_penalty
        token_scores = self._totals.diff(dim=2, prepend=torch.zeros_like(self._totals[:, :, :1]))
        everything = zip(*(x.tolist() for x in (self.count, self._lengths, self._tokens, scores, token_scores)), strict=True)
        ranked = []
        for count, lengths, tokens, values, parts in everything:
            order = sorted(range(count), key=lambda i: -values[i])[: config.num_best]
            ranked.append([Hypothesis(tokens[i][: lengths[i]], values[i], parts[i][: lengths[i]]) for i in order])
        return ranked
