"""The linear map of the model's layers: x W^T + b, with a backward pass of its own.

It keeps the Parameter for the backward pass, not what the Parameter holds in forward: under ZeRO-3 torch's own keeps a view of
the gathered weight, and so every gathered layer, alive until its backward pass. It also sums the gradient of an input that the
ranks of a tensor group share while the gradient of the weight is computed. That gradient is summed in float32, and rounded to
the weight's dtype unless the Parameter takes it as it is (`grad_dtype`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dstrain.ops.kernels import matmul_kernel
from dstrain.ops.mixed_precision import gradient_dtype, matmul_into, to_autocast_dtype
from dstrain.parallel.collectives import copy_to
from dstrain.parallel.group import Group


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: Group | None = None, transposed: bool = False
) -> Tensor:
    """(..., I) -> (..., O). weight: (O, I), (I, O) if `transposed`; bias: (O,).

    group: the ranks that hold the other rows of a weight, if x is the same on all of them and needs the sum of their gradients;
    None if x needs only its own.
    """
    if not torch.is_grad_enabled():
        return F.linear(x, weight.t() if transposed else weight, bias)
    if group is not None and torch.compiler.is_compiling():
        # A collective inside a Function would be traced into a graph without it, and the gradient be wrong without a word.
        x, group = copy_to(x, group), None
    operands = [None if each is None else to_autocast_dtype(each) for each in (x, weight, bias)]
    product: Tensor = _Linear.apply(*operands, group, transposed)  # type: ignore[no-untyped-call]
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, group, transposed = inputs
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.transposed, ctx.grad_dtype = group, transposed, gradient_dtype(weight)
        rows, matrix = x.reshape(-1, x.shape[-1]), weight if transposed else weight.t()  # (N, I), (I, O)
        with torch.autocast(x.device.type, enabled=False):
            product = matmul_kernel(rows, matrix)(rows, matrix, bias=bias)
        # No view, which autograd would not let callers change in place.
        return product if x.ndim == 2 else torch.ops.aten._unsafe_view.default(product, (*x.shape[:-1], matrix.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (N, O)
        x_grad = weight_grad = bias_grad = wait = None
        if ctx.needs_input_grad[0]:
            matrix = weight.t() if ctx.transposed else weight  # (O, I)
            x_grad = matmul_kernel(rows, matrix)(rows, matrix)
            wait = None if ctx.group is None else ctx.group.start_all_reduce(x_grad)
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1])
            left, right = (inputs, rows) if ctx.transposed else (rows, inputs)
            weight_grad = rows.new_empty(left.shape[1], right.shape[1], dtype=ctx.grad_dtype)
            matmul_into(left.t(), right, out=weight_grad)
        if ctx.needs_input_grad[2]:
            bias_grad = rows.sum(0, dtype=ctx.grad_dtype)
        if wait is not None:
            wait()
        return None if x_grad is None else x_grad.view(x.shape), weight_grad, bias_grad, None, None
