"""LayerNorm and RMSNorm in one pass, of x or of residual + dropout(x).

The sum is a second output, which pre-norm layers go on with. A program has a whole row, at most some 16,384 features. In the
backward pass a program has several rows; each adds up its part of the gradients of weight and bias, and torch adds up the parts:
one order, no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.ops.dropout import CountedMask
from dstrain.ops.norm import NormedSum, NormWeights
from dstrain.ops.triton.dropout import MaskArguments, kept_scale
from dstrain.ops.triton.launch import as_rows, warps_for, whole_block

BACKWARD_PROGRAMS = 512
"""Of the backward pass: three or four for each multiprocessor of a large GPU."""


def triton_norm(x: Tensor, norm: NormWeights, residual: Tensor | None = None, mask: CountedMask | None = None) -> NormedSum:
    """See `composed_norm`."""
    mask = None if mask is None or mask.p == 0 or residual is None else mask
    total, normed = _Norm.apply(x, residual, norm.weight, norm.bias, mask, norm)
    return NormedSum(x if residual is None else total, normed)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        mask: CountedMask | None,
        norm: NormWeights,
    ) -> tuple[Tensor | None, Tensor]:
        """total (None without a residual: it is x), normed"""
        rows, features = as_rows(x), x.shape[-1]
        added = rows if residual is None else as_rows(residual)
        total = rows if residual is None else rows.new_empty(rows.shape)  # what is normed
        out, statistics = rows.new_empty(rows.shape), rows.new_empty(len(rows), 2, dtype=torch.float32)
        block = whole_block(features)
        if len(rows):
            _forward_kernel[(len(rows),)](
                rows,
                added,
                total,
                out,
                statistics,
                weight,
                weight if bias is None else bias,
                *_mask_arguments(mask, weight, features),
                features,
                rows.stride(0),
                added.stride(0),
                norm.eps,
                RESIDUAL=residual is not None,
                MASK=mask is not None,
                CENTERED=norm.centered,
                BIAS=bias is not None,
                BLOCK=block,
                num_warps=warps_for(block),
            )
        # The Parameter, not what it holds now: under ZeRO-3 that would keep every gathered weight alive.
        ctx.save_for_backward(total, statistics, weight)
        ctx.mask, ctx.centered, ctx.bias_dtype = mask, norm.centered, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)  # post-norm layers do not use the sum
        return None if residual is None else total.view(x.shape), out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, stream_grad: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        total, statistics, weight = ctx.saved_tensors
        if grad is None:
            if stream_grad is None:
                return (None,) * 6
            grad = torch.zeros_like(stream_grad)
        rows, features, mask = as_rows(grad), grad.shape[-1], ctx.mask
        stream = rows if stream_grad is None else as_rows(stream_grad)
        total_grad = rows.new_empty(rows.shape)
        x_grad = total_grad if mask is None else rows.new_empty(rows.shape)
        programs, block = min(len(rows), BACKWARD_PROGRAMS), whole_block(features)
        parts = rows.new_empty(2, programs, features, dtype=torch.float32)
        if programs:
            _backward_kernel[(programs,)](
                rows,
                total,
                stream,
                total_grad,
                x_grad,
                parts,
                statistics,
                weight,
                *_mask_arguments(mask, weight, features),
                len(rows),
                features,
                rows.stride(0),
                total.stride(0),
                stream.stride(0),
                STREAM=stream_grad is not None,
                MASK=mask is not None,
                CENTERED=ctx.centered,
                BLOCK=block,
                num_warps=2 * warps_for(block),  # it keeps three rows of numbers in registers
            )
        weight_grad = parts[0].sum(0).to(weight.dtype)
        bias_grad = None if ctx.bias_dtype is None else parts[1].sum(0).to(ctx.bias_dtype)
        residual_grad = total_grad.view(grad.shape) if ctx.needs_input_grad[1] else None
        return x_grad.view(grad.shape), residual_grad, weight_grad, bias_grad, None, None


def _mask_arguments(mask: CountedMask | None, like: Tensor, features: int) -> MaskArguments:
    """Any tensors if there is no mask: nothing is read from them."""
    return MaskArguments(like, like, 0, 0, 1.0) if mask is None else MaskArguments.of(mask, features)


@triton.jit
def _forward_kernel(
    x,
    residual,
    total,
    out,
    statistics,
    weight,
    bias,
    keys,
    counters,
    skipped,
    lowest,
    scale,
    features,
    x_stride,
    residual_stride,
    eps,
    RESIDUAL: tl.constexpr,
    MASK: tl.constexpr,
    CENTERED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """statistics: (n, 2), mean and inverse deviation of each row. total is written if there is a residual."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if MASK:
        value *= kept_scale(tl.load(keys + row), counters, columns, inside, skipped, lowest, scale)
    if RESIDUAL:
        value += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * features + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the backward pass sees the same numbers
    mean = tl.full((), 0.0, tl.float32)
    if CENTERED:
        mean = tl.sum(value, 0) / features
    centered = tl.where(inside, value - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centered * centered, 0) / features + eps)
    normed = centered * inverse * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        normed += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * features + columns, normed.to(out.dtype.element_ty), mask=inside)
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, inverse)


@triton.jit
def _backward_kernel(
    grad,
    total,
    stream_grad,
    total_grad,
    x_grad,
    parts,
    statistics,
    weight,
    keys,
    counters,
    skipped,
    lowest,
    scale,
    rows,
    features,
    grad_stride,
    total_stride,
    stream_stride,
    STREAM: tl.constexpr,
    MASK: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """stream_grad: of the sum, apart from its norm. parts: (2, programs, D), of the gradients of weight and bias.

    x_grad is written if there is a mask.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    weight_grad, bias_grad = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for number in range(program, rows, programs):
        row = tl.cast(number, tl.int64)
        mean, inverse = tl.load(statistics + 2 * row), tl.load(statistics + 2 * row + 1)
        out_grad = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + row * total_stride + columns, mask=inside, other=0.0).to(tl.float32)
        normed = tl.where(inside, (value - mean) * inverse, 0.0)
        weight_grad += out_grad * normed
        bias_grad += out_grad
        scaled = out_grad * factors
        value_grad = scaled - normed * (tl.sum(scaled * normed, 0) / features)
        if CENTERED:
            value_grad -= tl.sum(scaled, 0) / features
        value_grad *= inverse
        if STREAM:
            value_grad += tl.load(stream_grad + row * stream_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(total_grad + row * features + columns, value_grad.to(total_grad.dtype.element_ty), mask=inside)
        if MASK:
            value_grad *= kept_scale(tl.load(keys + row), counters, columns, inside, skipped, lowest, scale)
            tl.store(x_grad + row * features + columns, value_grad.to(x_grad.dtype.element_ty), mask=inside)
    part = program.to(tl.int64) * features
    tl.store(parts + part + columns, weight_grad, mask=inside)
    tl.store(parts + programs.to(tl.int64) * features + part + columns, bias_grad, mask=inside)
