"""Label-smoothed cross-entropy of single tokens.

With V vocabulary entries (special tokens included), eps = label smoothing, eps' = eps / (V - 1), logits z and label y the loss is

    (1 - eps - eps') nll + eps' smooth,    nll = lse - z(y),    smooth = -sum_v log p(v) = V lse - sum_v z(v)

and its gradient with respect to z is p - (1 - eps - eps') onehot(y) - eps'. The sum of the logits and the constant eps' are
linear in z, so `chunked_projection` takes them without touching the logits.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LabelSmoothing(NamedTuple):
    """confidence: 1 - eps - eps'; per_token: eps'."""

    confidence: float
    per_token: float
    vocab_size: int

    @classmethod
    def of(cls, label_smoothing: float, vocab_size: int) -> LabelSmoothing:
        """For so many vocabulary entries."""
        per_token = label_smoothing / (vocab_size - 1)
        return cls(1 - label_smoothing - per_token, per_token, vocab_size)

    def loss(self, nll: Tensor, lse: Tensor, logit_sums: Tensor) -> Tensor:
        """The head of this file. (c, 1) each -> (c, 1)"""
        loss = self.confidence * nll
        return loss.add_(self.vocab_size * lse - logit_sums, alpha=self.per_token) if self.per_token else loss
