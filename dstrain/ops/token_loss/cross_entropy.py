"""Vocabulary projection and label-smoothed cross-entropy in one, without the logits of all tokens at once.

The formula is in `smoothing.py`. On a CPU the logits are read and written by three matrix products, one softmax and two maxima.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.config_base import ChunkTokens
from dstrain.ops.chunked_projection import TokenLosses, chunked_loss
from dstrain.ops.kernels import CROSS_ENTROPY
from dstrain.ops.mixed_precision import accum_dtype, to_autocast_dtype
from dstrain.ops.token_loss.smoothing import LabelSmoothing
from dstrain.ops.vocabulary import VocabularySlice


@dataclass(frozen=True)
class TokenCrossEntropy:
    """Implements `TokenLoss` on labels (c, 1). Metric: the negative log-likelihood, without smoothing."""

    label_smoothing: float
    num_metrics = 1

    def __call__(
        self, logits: Tensor, logit_sums: Tensor, labels: Tensor, vocabulary: VocabularySlice, weights: Tensor | None
    ) -> TokenLosses:
        """(c, V), (c, 1), (c, 1)"""
        smoothing = LabelSmoothing.of(self.label_smoothing, vocabulary.vocab_size)
        kernel = CROSS_ENTROPY.choose(logits.device, logits.dtype)
        losses: TokenLosses = kernel(logits, logit_sums, labels, smoothing, vocabulary, weights=weights)
        return losses


def composed_cross_entropy(
    logits: Tensor,
    logit_sums: Tensor,
    labels: Tensor,
    smoothing: LabelSmoothing,
    vocabulary: VocabularySlice,
    *,
    weights: Tensor | None,
) -> TokenLosses:
    """By torch's softmax; weights would be a pass more. (c, V), (c, 1), (c, 1)"""
    reductions = vocabulary.reductions()
    label_logits, total = reductions.gather(logits, labels), reductions.add(logit_sums)
    normalizer = reductions.softmax_(logits).result()
    nll = normalizer.nll(label_logits.result())
    loss = smoothing.loss(nll, normalizer.logsumexp, total.result())
    logits_grad = vocabulary.add_at_(logits, labels, -smoothing.confidence)
    return TokenLosses(loss, (nll,), logits_grad, smoothing.per_token)


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    chunk_tokens: ChunkTokens,
    token_weights: Tensor | None = None,
    vocabulary: VocabularySlice | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of the label-smoothed loss, and the negative log-likelihood of each token, in nats.

    features: (N, E), weight: (V, E), labels: (N,) int64 in [0, V). token_weights: (N,) factors of the tokens' losses, without
    gradient; the negative log-likelihood is not weighted. The rest as in `chunked_loss`.
    Returns loss_sum () with gradient to features and weight, nll (N,) without.
    """
    loss_sum, (nll,) = chunked_loss(
        features,
        weight,
        TokenCrossEntropy(label_smoothing),
        labels.unsqueeze(1),
        chunk_tokens=chunk_tokens,
        token_weights=token_weights,
        vocabulary=vocabulary,
    )
    return loss_sum, nll


@torch.no_grad()
def linear_nll(
    features: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: ChunkTokens, vocabulary: VocabularySlice | None = None
) -> Tensor:
    """The negative log-likelihood of each token, in nats, without gradient. Arguments as above -> (N,)"""
    loss = TokenCrossEntropy(0.0)
    targets = labels.unsqueeze(1)
    return chunked_loss(features, weight, loss, targets, chunk_tokens=chunk_tokens, vocabulary=vocabulary).metrics[0]


def reference_linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    chunk_tokens: ChunkTokens,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same from all logits by autograd; `chunk_tokens` is not used."""
    logits = F.linear(to_autocast_dtype(features), to_autocast_dtype(weight))  # (N, V)
    log_probs = F.log_softmax(logits.to(accum_dtype(logits.dtype)), dim=-1)
    nll = -log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)  # (N,)
    smoothing_per_token = label_smoothing / (weight.shape[0] - 1)
    loss = (1 - label_smoothing - smoothing_per_token) * nll - smoothing_per_token * log_probs.sum(1)
    return (loss if token_weights is None else loss * token_weights).sum(), nll.detach()
