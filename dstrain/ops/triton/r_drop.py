"""The divergence between two passes and its gradients: the formulas of `ops/token_loss/r_drop.py`.

With whole rows one launch reads the logits of both passes for the sums and once more for both gradients, besides the read of
each for its statistics. For a slice of the vocabulary the sums are one launch, and after the ranks have added them the gradients
are another. The five divergences of `divergence.py` cannot be used: each writes one gradient over what the other one reads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dstrain.ops.token_loss.r_drop import PassLosses
from dstrain.ops.triton.launch import block_for, warps_for
from dstrain.ops.triton.softmax import row_weights, softmax_statistics
from dstrain.ops.vocabulary import Reductions


def triton_r_drop(logits: Tensor, labels: Tensor, alpha: float, reductions: Reductions, weights: Tensor | None) -> PassLosses:
    """See `composed_r_drop`; the weights are factors of what the gradient's pass writes."""
    pending = [softmax_statistics(own, labels, reductions) for own in logits]
    first, second = (each.result() for each in pending)
    nll = (first.max - first.label_logit + first.log_sum) + (second.max - second.label_logit + second.log_sum)
    lse = first.max + first.log_sum + second.max + second.log_sum
    row_numbers = torch.cat([first.max, first.log_sum, second.max, second.log_sum], 1)
    row_weight = row_weights(1.0 if weights is None else weights, logits[0])
    rows, entries = logits.shape[1:]
    sums = logits.new_empty(rows, 3)

    def launch(sums: Tensor, *, with_sums: bool, with_gradient: bool) -> None:
        if rows:
            _r_drop_kernel[(rows,)](
                logits[0],
                logits[1],
                row_numbers,
                sums,
                row_weight,
                row_weight.stride(0),
                alpha / 4,
                entries,
                logits.stride(1),
                SUMS=with_sums,
                GRADIENT=with_gradient,
                BLOCK=block_for(entries),
                num_warps=warps_for(block_for(entries)),
            )

    is_whole = reductions.vocabulary.group is None
    launch(sums, with_sums=True, with_gradient=is_whole)
    if not is_whole:
        sums = reductions.add(sums).result().contiguous()
        launch(sums, with_sums=False, with_gradient=True)
    return PassLosses(nll, lse, sums[:, :1] / 2, weights)


@triton.jit
def _probabilities(first, second, columns, inside, p_max, p_log_sum, q_max, q_log_sum):
    """Of a block: p, q and log p - log q."""
    p_log = tl.load(first + columns, mask=inside, other=0.0) - p_max - p_log_sum
    q_log = tl.load(second + columns, mask=inside, other=0.0) - q_max - q_log_sum
    return tl.exp(p_log), tl.exp(q_log), p_log - q_log


@triton.jit
def _r_drop_kernel(
    first_logits,
    second_logits,
    row_numbers,
    sums,
    weights,
    weight_stride,
    kl_factor,
    entries,
    stride,
    SUMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums: (c, 3), with s = log p - log q those of (p - q) s, p s and q s; written if SUMS, else read. kl_factor: alpha / 4."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    first, second, own = first_logits + row * stride, second_logits + row * stride, row_numbers + row * 4
    p_max, p_log_sum, q_max, q_log_sum = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
    if SUMS:
        values, p_ratios, q_ratios = (
            tl.zeros((BLOCK,), tl.float32),
            tl.zeros((BLOCK,), tl.float32),
            tl.zeros((BLOCK,), tl.float32),
        )
        for start in range(0, entries, BLOCK):
            columns = start + at
            inside = columns < entries
            p, q, ratio = _probabilities(first, second, columns, inside, p_max, p_log_sum, q_max, q_log_sum)
            values += tl.where(inside, (p - q) * ratio, 0.0)
            p_ratios += tl.where(inside, p * ratio, 0.0)
            q_ratios += tl.where(inside, q * ratio, 0.0)
        p_mean, q_mean = tl.sum(p_ratios, 0), tl.sum(q_ratios, 0)
        tl.store(sums + 3 * row, tl.sum(values, 0))
        tl.store(sums + 3 * row + 1, p_mean)
        tl.store(sums + 3 * row + 2, q_mean)
    else:
        p_mean, q_mean = tl.load(sums + 3 * row + 1), tl.load(sums + 3 * row + 2)
    if GRADIENT:
        weight = tl.load(weights + row * weight_stride)
        for start in range(0, entries, BLOCK):
            columns = start + at
            inside = columns < entries
            p, q, ratio = _probabilities(first, second, columns, inside, p_max, p_log_sum, q_max, q_log_sum)
            p_grad = 0.5 * p + kl_factor * (p - q + p * (ratio - p_mean))
            q_grad = 0.5 * q + kl_factor * (q - p - q * (ratio - q_mean))
            tl.store(first + columns, weight * p_grad, mask=inside)
            tl.store(second + columns, weight * q_grad, mask=inside)
