"""Vocabulary projections of two passes over the same tokens, cross-entropy and the divergence between the two, in one.

R-Drop (Liang et al. 2021, "R-Drop: Regularized dropout for neural networks") runs each sentence twice with different dropout and
keeps the two distributions p and q of every token together. Its paper's loss of a token is

    CE(p) + CE(q) + alpha kl,    kl = (KL(p || q) + KL(q || p)) / 2 = 1/2 sum_v (p(v) - q(v)) (log p(v) - log q(v))

and half of that is taken here, so that alpha = 0 is plain cross-entropy in expectation, while alpha weighs the same two terms
against each other as in the paper. CE is label-smoothed as in `linear_cross_entropy`. Every term of kl's last form is at least 0,
so kl is exactly 0 where both passes have the same bits, and never less.

As in `linear_cross_entropy` the rows are walked in chunks, and while a chunk's logits exist, of both passes, the gradients are
taken. With s(v) = log p(v) - log q(v), kl's gradient with respect to the logits of p is 1/2 (p - q + p (s - sum_v p(v) s(v)));
that of q is its mirror image. Memory: some three times chunk_tokens x V in fp32, plus the gradients.

Precision and ignored rows are as there. The weight is read in forward alone and never kept.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.batch import IGNORE_INDEX
from dstrain.ops.forward_gradients import sums_with_gradients
from dstrain.ops.mixed_precision import accumulator, add_product, autocast, product


class RDropSums(NamedTuple):
    """() sums over scored rows, in nats. loss: weighted, with gradient to features and weight; nll, the mean of both passes, and
    kl have neither."""

    loss: Tensor
    nll: Tensor
    kl: Tensor


def linear_r_drop(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    label_smoothing: float,
    chunk_tokens: int,
    row_weights: Tensor | None = None,
) -> RDropSums:
    """All sums of the head of this file.

    features: (2, N, E), both passes over N tokens; weight: (V, E), of the same dtype; labels: (N,) int64 in [0, V) or
    `IGNORE_INDEX`. chunk_tokens: rows of both passes together whose logits exist at one time; it moves no result beyond rounding.
    row_weights: (N,) what each token's loss is multiplied by, without gradient; None = all are 1.
    """
    features, weight = autocast(features), autocast(weight)
    with_grad = torch.is_grad_enabled()
    options = _Options(
        alpha=alpha,
        label_smoothing=label_smoothing,
        chunk_tokens=chunk_tokens,
        row_weights=row_weights,
        features_learn=with_grad and features.requires_grad,
        weight_learns=with_grad and weight.requires_grad,
    )
    return RDropSums(*sums_with_gradients(features, weight, partial(_walk, labels=labels, options=options)))


def reference_linear_r_drop(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    label_smoothing: float,
    chunk_tokens: int,
    row_weights: Tensor | None = None,
) -> RDropSums:
    """The same by all logits and autograd; `chunk_tokens` is not used."""
    scored = labels != IGNORE_INDEX
    logits = F.linear(autocast(features[:, scored]), autocast(weight))  # (2, n, V)
    log_probs = F.log_softmax(logits.to(accumulator(logits.dtype)), dim=-1)
    nll = -log_probs.gather(2, labels[scored].expand(2, -1).unsqueeze(2)).squeeze(2).sum(0)  # (n,)
    spread = label_smoothing / (weight.shape[0] - 1)
    hard = (1 - label_smoothing - spread) * nll - spread * log_probs.sum((0, 2))
    p, q = log_probs
    there, back = (F.kl_div(x, y, reduction="none", log_target=True).sum(1) for x, y in ((q, p), (p, q)))
    kl = (there + back) / 2
    loss = (hard + alpha * kl) / 2
    loss_sum = (loss if row_weights is None else loss * row_weights[scored]).sum()
    return RDropSums(loss_sum, (nll.sum() / 2).detach(), kl.sum().detach())


class _Options(NamedTuple):
    alpha: float
    label_smoothing: float
    chunk_tokens: int
    row_weights: Tensor | None
    features_learn: bool
    weight_learns: bool


def _walk(
    features: Tensor, weight: Tensor, labels: Tensor, options: _Options
) -> tuple[RDropSums, tuple[Tensor | None, Tensor | None]]:
    """The sums and, as far as asked for, the gradients of the loss with respect to features and weight."""
    num_rows, vocab_size = features.shape[1], weight.shape[0]
    spread = options.label_smoothing / (vocab_size - 1)
    confidence = 1 - options.label_smoothing - spread
    scored = (labels != IGNORE_INDEX).unsqueeze(1)  # (N, 1)
    labels = labels.unsqueeze(1).masked_fill(~scored, 0)
    features = features.masked_fill(~scored, 0)

    wide = accumulator(features.dtype)
    halves = scored.to(wide) / 2  # (N, 1)
    if options.row_weights is not None:
        halves = halves * options.row_weights.unsqueeze(1).masked_fill(~scored, 0)
    weighted = features * halves  # (2, N, E): slopes stay unweighted, so that small weights do not underflow in 16 bits
    feature_sum, weight_sum = weighted.sum((0, 1)), weight.sum(0, dtype=wide)  # (E,), (E,)
    weighted = weighted.to(features.dtype)
    step = max(1, options.chunk_tokens // 2)
    logits = features.new_empty(2, min(step, num_rows), vocab_size, dtype=wide)
    hard, nll, kl = features.new_empty(3, num_rows, 1, dtype=wide)  # of both passes together
    features_gradient = torch.empty_like(features, dtype=wide) if options.features_learn else None
    weight_gradient = torch.zeros_like(weight, dtype=wide) if options.weight_learns else None

    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        label = labels[rows]
        log_probs = logits[:, : len(label)]  # (2, c, V)
        for own, chunk in zip(log_probs, features[:, rows], strict=True):
            product(chunk, weight.t(), out=own).sub_(own.logsumexp(1, keepdim=True))
        nll[rows] = -log_probs.gather(2, label.expand(2, -1, -1)).sum(0)
        hard[rows] = confidence * nll[rows] - spread * log_probs.sum((0, 2)).unsqueeze(1)
        kl[rows], slopes = _divergence(log_probs, options.alpha)
        for index, slope in enumerate(slopes):
            slope.scatter_add_(1, label, torch.full_like(kl[rows], -confidence))
            if features_gradient is not None:
                product(slope.to(features.dtype), weight, out=features_gradient[index, rows])
            if weight_gradient is not None:
                add_product(weight_gradient, slope.to(features.dtype).t(), weighted[index, rows])

    if features_gradient is not None:
        features_gradient.sub_(spread * weight_sum).mul_(halves)
    if weight_gradient is not None:
        weight_gradient.sub_(spread * feature_sum)
    loss = (halves * (hard + options.alpha * kl)).sum()
    nll_sum, kl_sum = (column.masked_fill_(~scored, 0).sum() for column in (nll, kl))
    return RDropSums(loss, nll_sum / 2, kl_sum), (features_gradient, weight_gradient)


def _divergence(log_probs: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """kl (c, 1), and p + alpha (gradient of kl) for both passes, (2, c, V), in the place of `log_probs`."""
    gap = log_probs[0] - log_probs[1]  # (c, V)
    probs = log_probs.exp_()
    difference = probs[0] - probs[1]
    kl = (difference * gap).sum(1, keepdim=True) / 2
    for own, sign in zip(probs, (1, -1), strict=True):
        pull = (gap - (own * gap).sum(1, keepdim=True)).mul_(sign * alpha / 2).add_(1)
        own.mul_(pull).add_(difference, alpha=sign * alpha / 2)
    return kl, probs
