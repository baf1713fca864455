"""Vocabulary projection and label-smoothed cross-entropy in one, without logits for all tokens at once.

`linear_cross_entropy` walks the rows in chunks. While a chunk's logits exist it takes the loss and at once both gradients,
so that backward only multiplies them by the gradient of the loss. Memory: chunk_tokens x V in fp32 instead of several times
N x V, plus the two gradients (N x E and V x E in fp32). The forward pass thus holds the work of the backward pass; without
gradients to compute (evaluation, `torch.no_grad`) it does the loss alone.

The loss is the predecessor's. With V types (specials included), eps = label smoothing, eps' = eps / (V - 1), log p the
log-softmax of the logits z = h W^T and y the label, a row's loss is

    (1 - eps - eps') nll + eps' smooth,    nll = -log p(y) = lse - z(y),    smooth = -sum_v log p(v) = V lse - h . sum_v W(v)

and its gradient with respect to z is p - (1 - eps - eps') onehot(y) - eps'. The terms with eps' are of rank one, so they never
touch the logits: on a CPU the logits are read and written by three matrix products, one softmax and one maximum, nothing else.

With `row_weights` a row's loss and gradient count so many times; a mean over each sentence is made of them.

Rows labelled `IGNORE_INDEX` add exactly zero, without a branch, so without waiting for a GPU. Their logits are still computed:
a caller that knows how many rows are scored leaves the others out first, by `scored_rows`, which does not wait either.

Precision: products run in the inputs' dtype (fp16 and bf16 on tensor cores); softmax, losses and the sum of the weight's gradient
are fp32 (fp64 for fp64 inputs). Under `torch.autocast` both inputs are cast to its dtype, as `F.linear` does; the rest stays.

The weight is read in forward alone and never kept: under ZeRO-3 it is whole only while the projection module runs.
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


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    chunk_tokens: int,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of the label-smoothed loss and of the negative log-likelihood, in nats.

    features: (N, E), weight: (V, E), of one dtype; labels: (N,) int64 in [0, V) or `IGNORE_INDEX`. chunk_tokens: rows whose
    logits exist at one time; it moves no result beyond rounding. row_weights: (N,) what each row's loss is multiplied by,
    without gradient; None = all are 1. The negative log-likelihood is not weighted.
    Returns loss_sum () with gradient to features and weight, nll_sum () without; both fp32 (fp64 for fp64 inputs).
    """
    features, weight = autocast(features), autocast(weight)
    with_grad = torch.is_grad_enabled()
    options = _Options(
        label_smoothing=label_smoothing,
        chunk_tokens=chunk_tokens,
        row_weights=row_weights,
        features_learn=with_grad and features.requires_grad,
        weight_learns=with_grad and weight.requires_grad,
    )
    loss_sum, nll_sum = sums_with_gradients(features, weight, partial(_walk, labels=labels, options=options))
    return loss_sum, nll_sum


def reference_linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    chunk_tokens: int,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by all logits and autograd; `chunk_tokens` is not used."""
    scored = labels != IGNORE_INDEX
    logits = F.linear(autocast(features[scored]), autocast(weight))  # (n, V)
    log_probs = F.log_softmax(logits.to(accumulator(logits.dtype)), dim=-1)
    nll = -log_probs.gather(1, labels[scored].unsqueeze(1)).squeeze(1)  # (n,)
    spread = label_smoothing / (weight.shape[0] - 1)
    loss = (1 - label_smoothing - spread) * nll - spread * log_probs.sum(1)
    return (loss if row_weights is None else loss * row_weights[scored]).sum(), nll.sum().detach()


def scored_rows(labels: Tensor, num_targets: int) -> Tensor:
    """Indices of the labels that count. labels: (N,) with exactly `num_targets` not `IGNORE_INDEX` -> (num_targets,) int64.

    The number is known on the CPU beforehand, so nothing waits for a GPU.
    """
    return torch.nonzero_static(labels != IGNORE_INDEX, size=num_targets).squeeze(1)


class _Options(NamedTuple):
    label_smoothing: float
    chunk_tokens: int
    row_weights: Tensor | None
    features_learn: bool
    weight_learns: bool


def _walk(
    features: Tensor, weight: Tensor, labels: Tensor, options: _Options
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """(loss_sum, nll_sum) and, as far as asked for, the gradients of loss_sum with respect to features and weight."""
    num_rows, vocab_size = features.shape[0], weight.shape[0]
    spread = options.label_smoothing / (vocab_size - 1)
    confidence = 1 - options.label_smoothing - spread
    scored = (labels != IGNORE_INDEX).unsqueeze(1)  # (N, 1)
    labels = labels.unsqueeze(1).masked_fill(~scored, 0)
    features = features.masked_fill(~scored, 0)

    wide = accumulator(features.dtype)
    weights = scored.to(wide)  # (N, 1)
    if options.row_weights is not None:
        weights = options.row_weights.unsqueeze(1).to(wide).masked_fill(~scored, 0)
    weighted = features * weights  # (N, E): slopes stay unweighted, so that small weights do not underflow in 16 bits
    feature_sum, weight_sum = weighted.sum(0), weight.sum(0, dtype=wide)  # (E,), (E,)
    weighted = weighted.to(features.dtype)
    logits = features.new_empty(min(options.chunk_tokens, num_rows), vocab_size, dtype=wide)
    nll, lse = features.new_empty(2, num_rows, 1, dtype=wide)
    features_gradient = torch.empty_like(features, dtype=wide) if options.features_learn else None
    weight_gradient = torch.zeros_like(weight, dtype=wide) if options.weight_learns else None

    for start in range(0, num_rows, options.chunk_tokens):
        rows = slice(start, start + options.chunk_tokens)
        chunk, label = features[rows], labels[rows]
        probs = product(chunk, weight.t(), out=logits[: len(chunk)])  # (c, V), logits until the softmax
        label_logit, top_logit = probs.gather(1, label), probs.amax(1, keepdim=True)
        torch.softmax(probs, 1, out=probs)
        log_share = probs.amax(1, keepdim=True).log_()  # top_logit - lse: never -inf, as the label's log-probability may be
        nll[rows] = top_logit - label_logit - log_share
        lse[rows] = top_logit - log_share
        if options.features_learn or options.weight_learns:
            slope = probs.scatter_add_(1, label, torch.full_like(log_share, -confidence)).to(features.dtype)
            if features_gradient is not None:
                product(slope, weight, out=features_gradient[rows])
            if weight_gradient is not None:
                add_product(weight_gradient, slope.t(), weighted[rows])

    if features_gradient is not None:
        features_gradient.sub_(spread * weight_sum).mul_(weights)
    if weight_gradient is not None:
        weight_gradient.sub_(spread * feature_sum)
    smooth_sum = vocab_size * (weights * lse).sum() - feature_sum.dot(weight_sum)
    loss_sum = confidence * (weights * nll).sum() + spread * smooth_sum
    return (loss_sum, nll.masked_fill_(~scored, 0).sum()), (features_gradient, weight_gradient)
