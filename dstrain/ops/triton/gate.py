"""Gated activation, activation(gate) * up, in one pass; the backward pass computes the activation again from the gate."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.ops.activation import ACTIVATIONS, composed_gate
from dstrain.ops.triton.launch import as_rows, block_for, warps_for

CODED_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "linear")
"""The activations that the kernel knows, by their codes; others are composed."""


def triton_gate(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """See `composed_gate`."""
    code = next((code for code, name in enumerate(CODED_ACTIVATIONS) if ACTIVATIONS[name] is activation), None)
    if code is None:
        return composed_gate(gate, up, activation)
    gated: Tensor = _Gate.apply(gate, up, code)
    return gated


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, code: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.code = code
        out = up.new_empty(up.shape)
        _launch(gate, up, out, out, out, code, is_backward=False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        gate_grad, up_grad = gate.new_empty(gate.shape), up.new_empty(up.shape)
        _launch(gate, up, grad, gate_grad, up_grad, ctx.code, is_backward=True)
        return gate_grad, up_grad, None


def _launch(gate: Tensor, up: Tensor, out: Tensor, gate_grad: Tensor, up_grad: Tensor, code: int, *, is_backward: bool) -> None:
    """out: what is written, or its gradient in the backward pass."""
    features = up.shape[-1]
    gates, ups, outs = as_rows(gate), as_rows(up), as_rows(out)
    block = block_for(features)
    if up.numel():
        _gate_kernel[(len(ups), triton.cdiv(features, block))](
            gates,
            ups,
            outs,
            gate_grad,
            up_grad,
            features,
            gates.stride(0),
            ups.stride(0),
            outs.stride(0),
            CODE=code,
            BACKWARD=is_backward,
            BLOCK=block,
            num_warps=warps_for(block),
        )


@triton.jit
def _activated(x, CODE: tl.constexpr):
    """The activation and its derivative; codes are those of `CODED_ACTIVATIONS`."""
    if CODE == 0:
        derivative = tl.where(x > 0, 1.0, 0.0)
        value = x * derivative
    elif CODE == 1:
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value, derivative = x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif CODE == 2:
        bent = 2 * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) - 1  # tanh(a) = 2 sigmoid(2 a) - 1
        value = 0.5 * x * (1 + bent)
        derivative = 0.5 * (1 + bent) + 0.5 * x * (1 - bent * bent) * 0.7978845608028654 * (1 + 0.134145 * x * x)
    elif CODE == 3:
        share = tl.sigmoid(x)
        value, derivative = x * share, share * (1 + x * (1 - share))
    elif CODE == 4:
        value = 2 * tl.sigmoid(2 * x) - 1
        derivative = 1 - value * value
    else:
        value, derivative = x, x * 0.0 + 1.0
    return value, derivative


@triton.jit
def _gate_kernel(
    gate,
    up,
    out,
    gate_grad,
    up_grad,
    features,
    gate_stride,
    up_stride,
    out_stride,
    CODE: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    gates = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, derivative = _activated(gates, CODE)
    pointer = out + row * out_stride + columns
    if BACKWARD:
        grad = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
        tl.store(gate_grad + row * features + columns, (grad * ups * derivative).to(gate_grad.dtype.element_ty), mask=inside)
        tl.store(up_grad + row * features + columns, (grad * value).to(up_grad.dtype.element_ty), mask=inside)
    else:
        tl.store(pointer, (value * ups).to(out.dtype.element_ty), mask=inside)
