"""The softmax of logits over a slice of the vocabulary: its statistics in one read, its gradient in one read and one write.

A program goes through one row, so sums have one order and there are no atomics. Logits are float32. They may be divided by a
temperature T; the plain sum is the one at T = 1, if that is asked for besides.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dstrain.ops.triton.launch import block_for, warps_for
from dstrain.ops.vocabulary import Pending, Reductions


class SoftmaxStatistics(NamedTuple):
    """(c, 1) each. max: the highest logit z; best: its token id, the first of equal ones. log_sum: log sum exp((z - max) / T);

    plain_log_sum: the same for T = 1. label_logit: 0 if no label was given.
    """

    max: Tensor
    best: Tensor
    log_sum: Tensor
    plain_log_sum: Tensor
    label_logit: Tensor


def softmax_statistics(
    logits: Tensor, labels: Tensor | None, reductions: Reductions, *, temperature: float = 1.0, with_plain: bool = False
) -> Pending[SoftmaxStatistics]:
    """Of all entries of the vocabulary, in one collective with all that is waiting. (c, V), (c, 1)

    Without `with_plain` the plain sum is that at the temperature.
    """
    vocabulary, (rows, entries) = reductions.vocabulary, logits.shape
    own = logits.new_empty(rows, 5)
    if rows:
        _statistics_kernel[(rows,)](
            logits,
            logits if labels is None else labels,
            own,
            entries,
            logits.stride(0),
            vocabulary.start,
            1 / temperature,
            BLOCK=block_for(entries),
            PLAIN=with_plain,
            LABELS=labels is not None,
            num_warps=warps_for(block_for(entries)),
        )

    def merge(ranks: Tensor) -> SoftmaxStatistics:
        """(c, t, 5)"""
        maxima, ids, sums, plain_sums, label_logits = ranks.unbind(2)  # (c, t) each
        highest = maxima.amax(1, keepdim=True)
        best = ids.masked_fill(maxima != highest, vocabulary.vocab_size).amin(1, keepdim=True).long()
        log_sum = sums.mul((maxima - highest).div_(temperature).exp_()).sum(1, keepdim=True).log_()
        plain = plain_sums.mul((maxima - highest).exp_()).sum(1, keepdim=True).log_() if with_plain else log_sum
        return SoftmaxStatistics(highest, best, log_sum, plain, label_logits.sum(1, keepdim=True))

    return reductions.combine(own, merge)


def softmax_gradient_(
    logits: Tensor, statistics: SoftmaxStatistics, *, weight: Tensor, plain_weight: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """Write weight softmax(z / T) + plain_weight softmax(z) over the logits z. weight: (c, 1), may be expanded."""
    rows, entries = logits.shape
    if rows:
        _gradient_kernel[(rows,)](
            logits,
            statistics.max,
            statistics.log_sum,
            statistics.plain_log_sum,
            weight,
            weight.stride(0),
            plain_weight,
            entries,
            logits.stride(0),
            1 / temperature,
            BLOCK=block_for(entries),
            PLAIN=plain_weight != 0,
            num_warps=warps_for(block_for(entries)),
        )
    return logits


def row_weights(weight: Tensor | float, like: Tensor) -> Tensor:
    """A weight for each row, (c, 1), of one that may be the same for all."""
    if isinstance(weight, Tensor):
        return weight.to(torch.float32)
    return like.new_full((1, 1), weight, dtype=torch.float32).expand(len(like), 1)


@triton.jit
def _statistics_kernel(
    logits,
    labels,
    statistics,
    entries,
    stride,
    first_id,
    inverse_temperature,
    BLOCK: tl.constexpr,
    PLAIN: tl.constexpr,
    LABELS: tl.constexpr,
):
    """Columns of `statistics`: max, token id of the max, sum at the temperature, plain sum, logit of the label or 0."""
    row = tl.program_id(0).to(tl.int64)
    pointer = logits + row * stride
    at = tl.arange(0, BLOCK)
    highest = tl.full((), float("-inf"), tl.float32)
    best = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float32)
    plain = tl.full((), 0.0, tl.float32)
    for start in range(0, entries, BLOCK):
        columns = start + at
        x = tl.load(pointer + columns, mask=columns < entries, other=float("-inf")).to(tl.float32)
        highest_here = tl.max(x, 0)
        best = tl.where(highest_here > highest, start + tl.argmax(x, 0), best)  # of equal ones the first
        higher = tl.maximum(highest, highest_here)
        total = total * tl.exp((highest - higher) * inverse_temperature) + tl.sum(tl.exp((x - higher) * inverse_temperature), 0)
        if PLAIN:
            plain = plain * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    out = statistics + row * 5
    tl.store(out, highest)
    tl.store(out + 1, (best + first_id).to(tl.float32))
    tl.store(out + 2, total)
    tl.store(out + 3, plain)
    label_logit = tl.full((), 0.0, tl.float32)
    if LABELS:
        label = tl.load(labels + row) - first_id
        label_logit = tl.load(pointer + label, mask=(label >= 0) & (label < entries), other=0.0).to(tl.float32)
    tl.store(out + 4, label_logit)


@triton.jit
def _gradient_kernel(
    logits,
    maxima,
    log_sums,
    plain_log_sums,
    weights,
    weight_stride,
    plain_weight,
    entries,
    stride,
    inverse_temperature,
    BLOCK: tl.constexpr,
    PLAIN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pointer = logits + row * stride
    at = tl.arange(0, BLOCK)
    highest, log_sum, weight = tl.load(maxima + row), tl.load(log_sums + row), tl.load(weights + row * weight_stride)
    plain_log_sum = tl.load(plain_log_sums + row)
    for start in range(0, entries, BLOCK):
        columns = start + at
        below = tl.load(pointer + columns, mask=columns < entries, other=0.0).to(tl.float32) - highest
        gradient = weight * tl.exp(below * inverse_temperature - log_sum)
        if PLAIN:
            gradient += plain_weight * tl.exp(below - plain_log_sum)
        tl.store(pointer + columns, gradient, mask=columns < entries)
