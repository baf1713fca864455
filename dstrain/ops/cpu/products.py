"""Products of float32 matrices in C++ (`cpp/products.cpp`), for training: of many rows, with weights that change at each
step.

torch multiplies by MKL, which uses no AVX512 on processors of AMD. There the kernel takes 0.90 of MKL's time, over the products
of a layer and of the vocabulary in both directions (AMD EPYC with AVX512, 512 to 3,432 rows, 128 to 2,048 features). On other
processors it has not been measured.

With few rows packing the right matrix costs more than the product.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dstrain.ops.cpu.native import function

LEAST_ROWS = 64
"""From which on a product is worth packing the right matrix."""


class _Matrix(Structure):
    _fields_ = [("data", c_void_p), ("of_row", c_int64), ("of_column", c_int64)]


_OPERATORS = torch.library.Library("dstrain", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define("matmul(Tensor left, Tensor right, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


def torch_matmul(
    left: Tensor, right: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """left (M, K) right (K, N) + bias (N,) -> (M, N), in `out` if there is one; `add`: without a bias, added to what is there."""
    if add and out is not None:
        return torch.addmm(out, left, right, out=out)
    return torch.mm(left, right, out=out) if bias is None else torch.addmm(bias, left, right, out=out)


def native_matmul(
    left: Tensor, right: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """The same in float32; not recorded by autograd."""
    if out is None:
        # As an operator of torch's dispatcher, which selective activation checkpointing looks at.
        product: Tensor = torch.ops.dstrain.matmul.default(left, right, bias)
        return product
    return _multiply_into(out, left, right, bias, add)


def _multiply_into(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, add: bool) -> Tensor:
    (rows, inner), columns = left.shape, right.shape[1]
    fits = right.shape[0] == inner and out.shape == (rows, columns) and (bias is None or bias.shape == (columns,))
    all_float32 = all(each is None or each.dtype == torch.float32 for each in (left, right, bias, out))
    if not fits or not all_float32 or 0 in (rows, inner, columns) or out.stride(1) != 1:
        return torch_matmul(left, right, bias=bias, out=out, add=add)  # which refuses what does not fit
    left, right = (each if 1 in each.stride() else each.contiguous() for each in (left, right))
    bias = None if bias is None else bias.contiguous()
    sizes = rows, inner, columns, add
    _multiply()(
        *(byref(_Matrix(each.data_ptr(), *each.stride())) for each in (left, right)),
        None if bias is None else bias.data_ptr(),
        *sizes,
        out.data_ptr(),
        out.stride(0),
        torch.get_num_threads(),
    )
    return out


def _matmul(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return _multiply_into(left.new_empty(left.shape[0], right.shape[1]), left, right, bias, False)


_OPERATORS.impl("matmul", _matmul, "CPU")  # type: ignore[no-untyped-call]


@cache
def _multiply() -> Callable[..., None]:
    matrix: Any = POINTER(_Matrix)
    return function("multiply_matrices", matrix, matrix, c_void_p, *[c_int64] * 4, c_void_p, c_int64, c_int64)
