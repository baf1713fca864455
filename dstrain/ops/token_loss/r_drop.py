"""Vocabulary projections of two passes over the same tokens, cross-entropy and the divergence between the two, in one.

R-Drop (Liang et al. 2021, "R-Drop: Regularized dropout for neural networks") runs each sentence twice with different dropout and
keeps the two distributions p and q of every token together. Its paper's loss of a token is

    CE(p) + CE(q) + alpha kl,    kl = (KL(p || q) + KL(q || p)) / 2 = 1/2 sum_v (p(v) - q(v)) (log p(v) - log q(v))

and half of that is taken here, so that alpha = 0 is plain cross-entropy in expectation, while alpha weighs the same two terms
against each other as in the paper. CE is label-smoothed, see `smoothing.py`. Every term of kl's last form is at least 0, so kl is
exactly 0 if both passes have the same bits, and never less.

With s(v) = log p(v) - log q(v), kl's gradient with respect to the logits of p is 1/2 (p - q + p (s - sum_v p(v) s(v))); that of q
is its mirror image. Memory: some three times chunk_tokens x V in fp32, plus the gradients.
A vocabulary in slices takes two collectives a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.config_base import ChunkTokens
from dstrain.ops.chunked_projection import TokenLosses, chunked_loss
from dstrain.ops.kernels import R_DROP
from dstrain.ops.mixed_precision import accum_dtype, to_autocast_dtype
from dstrain.ops.token_loss.smoothing import LabelSmoothing
from dstrain.ops.vocabulary import Reductions, VocabularySlice


class RDropSums(NamedTuple):
    """In nats. loss: () weighted sum, with gradient to features and weight; the others have neither.

    nll: (N,), of each token, the mean of both passes. kl: () sum.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor


@dataclass(frozen=True)
class TokenRDrop:
    """Implements `TokenLoss` on labels (c, 1) and the logits of both passes (2, c, V). Metrics: nll, kl."""

    alpha: float
    label_smoothing: float
    num_metrics = 2

    def __call__(
        self, logits: Tensor, logit_sums: Tensor, labels: Tensor, vocabulary: VocabularySlice, weights: Tensor | None
    ) -> TokenLosses:
        """(2, c, V), (2, c, 1), (c, 1)"""
        smoothing = LabelSmoothing.of(self.label_smoothing, vocabulary.vocab_size)
        reductions = vocabulary.reductions()
        total = reductions.add(logit_sums.sum(0))
        passes: PassLosses = R_DROP.choose(logits.device, logits.dtype)(logits, labels, self.alpha, reductions, weights)
        of_label = -smoothing.confidence / 2 if passes.weights is None else passes.weights * (-smoothing.confidence / 2)
        for own in logits:
            vocabulary.add_at_(own, labels, of_label)
        loss = (smoothing.loss(passes.nll, passes.lse, total.result()) + self.alpha * passes.kl) / 2
        return TokenLosses(loss, (passes.nll / 2, passes.kl), logits, smoothing.per_token / 2, passes.weights is not None)


class PassLosses(NamedTuple):
    """(c, 1) each. nll, lse: the sums of both passes. weights: those that the gradient has been multiplied by."""

    nll: Tensor
    lse: Tensor
    kl: Tensor
    weights: Tensor | None = None


def composed_r_drop(logits: Tensor, labels: Tensor, alpha: float, reductions: Reductions, weights: Tensor | None) -> PassLosses:
    """By log-probabilities. (2, c, V), (c, 1); the logits become half of p + alpha (gradient of kl) of each pass."""
    normalizers = [reductions.log_softmax(own, out=own) for own in logits]
    lse = torch.stack([each.result() for each in normalizers]).sum(0)
    label_log_probs = [reductions.gather(own, labels) for own in logits]
    log_ratio = logits[0] - logits[1]  # (c, V)
    probs = logits.exp_()
    difference = probs[0] - probs[1]
    kl = reductions.sum(difference * log_ratio)
    means = [reductions.sum(own * log_ratio) for own in probs]
    for own, mean, sign in zip(probs, means, (1, -1), strict=True):
        factor = (log_ratio - mean.result()).mul_(sign * alpha / 4).add_(0.5)
        own.mul_(factor).add_(difference, alpha=sign * alpha / 4)
    nll = torch.stack([each.result() for each in label_log_probs]).sum(0).neg_()
    return PassLosses(nll, lse, kl.result() / 2)


def linear_r_drop(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    label_smoothing: float,
    chunk_tokens: ChunkTokens,
    token_weights: Tensor | None = None,
    vocabulary: VocabularySlice | None = None,
) -> RDropSums:
    """All sums of the head of this file.

    features: (2, N, E), both passes over N tokens; weight: (V, E); labels: (N,) int64 in [0, V). The rest as in `chunked_loss`.
    """
    loss_sum, (nll, kl) = chunked_loss(
        features,
        weight,
        TokenRDrop(alpha, label_smoothing),
        labels.unsqueeze(1),
        chunk_tokens=chunk_tokens,
        token_weights=token_weights,
        vocabulary=vocabulary,
    )
    return RDropSums(loss_sum, nll, kl.sum())


def reference_linear_r_drop(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    label_smoothing: float,
    chunk_tokens: ChunkTokens,
    token_weights: Tensor | None = None,
) -> RDropSums:
    """The same from all logits by autograd; `chunk_tokens` is not used."""
    logits = F.linear(to_autocast_dtype(features), to_autocast_dtype(weight))  # (2, N, V)
    log_probs = F.log_softmax(logits.to(accum_dtype(logits.dtype)), dim=-1)
    nll = -log_probs.gather(2, labels.expand(2, -1).unsqueeze(2)).squeeze(2).sum(0)  # (N,)
    smoothing_per_token = label_smoothing / (weight.shape[0] - 1)
    hard = (1 - label_smoothing - smoothing_per_token) * nll - smoothing_per_token * log_probs.sum((0, 2))
    p, q = log_probs
    forward, backward = (F.kl_div(x, y, reduction="none", log_target=True).sum(1) for x, y in ((q, p), (p, q)))
    kl = (forward + backward) / 2
    loss = (hard + alpha * kl) / 2
    loss_sum = (loss if token_weights is None else loss * token_weights).sum()
    return RDropSums(loss_sum, (nll / 2).detach(), kl.sum().detach())
