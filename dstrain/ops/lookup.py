"""Rows of a table by index, whose gradient is summed in float32.

A frequent token has a gradient from thousands of positions; on a CPU torch adds them up in the table's own dtype, and bfloat16
holds three digits. The sum is rounded to that dtype once, unless the Parameter takes it as it is (`grad_dtype`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dstrain.ops.mixed_precision import accum_dtype, gradient_dtype


def lookup(indices: Tensor, table: Tensor) -> Tensor:
    """(...) int64, (V, D) -> (..., D)"""
    if not torch.is_grad_enabled() or accum_dtype(table.dtype) == table.dtype:
        return F.embedding(indices, table)
    rows: Tensor = _Lookup.apply(indices, table)  # type: ignore[no-untyped-call]
    return rows


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.num_rows, ctx.grad_dtype = len(table), gradient_dtype(table)
        return F.embedding(indices, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (indices,) = ctx.saved_tensors
        grad = grad.to(accum_dtype(grad.dtype))
        total = torch.ops.aten.embedding_dense_backward(grad, indices, ctx.num_rows, -1, False)  # -1: no row is padding
        return None, total.to(ctx.grad_dtype)
