"""Products of float32 matrices in C++ (`cpp/products.cpp`), for training: of many rows, with weights that change at each
step.

torch multiplies by MKL, which uses no AVX512 on processors of AMD. There the kernel takes 0.90 of MKL's time, over the products
of a layer and of the vocabulary in both directions (AMD EPYC with AVX512, 512 to 3,432 rows, 128 to 2,048 features), and 0.94 if
it has AVX2 only. On processors of others it has not been measured.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dstrain.ops.cpu.native import function

LEAST_SIZE = 1 << 23
"""Multiply-adds from which on the product is the faster one: a call costs 10 microseconds more than torch's."""

LEAST_SIDE = 64
"""Rows, columns and terms that pay for packing; columns are packed by 16 or 32."""


class _Matrix(Structure):
    _fields_ = [("data", c_void_p), ("of_row", c_int64), ("of_column", c_int64)]


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
        product: Tensor = torch.ops.dstrain.matmul.default(left, right, bias)
        return product
    torch.ops.dstrain.matmul_into.default(left, right, bias, out, add)
    return out


def _matmul(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    out = left.new_empty(left.shape[0], right.shape[1])
    _matmul_into(left, right, bias, out, False)
    return out


def _matmul_into(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> None:
    (rows, inner), columns = left.shape, right.shape[1]
    operands = [each for each in (left, right, bias, out) if each is not None]
    plain = all(each.dtype == torch.float32 and each.is_cpu and not each.is_neg() for each in operands)
    fits = right.shape[0] == inner and out.shape == (rows, columns) and (bias is None or bias.shape == (columns,))
    own_rows = out.stride(1) == 1 and (rows == 1 or out.stride(0) >= columns)
    if not (fits and plain and own_rows) or 0 in (rows, inner, columns):
        torch_matmul(left, right, bias=bias, out=out, add=add)  # which refuses what does not fit
        return
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


@cache
def _multiply() -> Callable[..., None]:
    matrix: Any = POINTER(_Matrix)
    return function("multiply_matrices", matrix, matrix, c_void_p, *[c_int64] * 4, c_void_p, c_int64, c_int64)


def _register() -> torch.library.Library:
    """As operators of torch's dispatcher, which selective activation checkpointing looks at."""
    operators: Any = torch.library.Library("dstrain", "FRAGMENT")  # type: ignore[no-untyped-call]
    operators.define("matmul(Tensor left, Tensor right, Tensor? bias) -> Tensor")
    operators.define("matmul_into(Tensor left, Tensor right, Tensor? bias, Tensor(a!) out, bool add) -> ()")
    operators.impl("matmul", _matmul, "CPU")
    operators.impl("matmul_into", _matmul_into, "CPU")
    operators.impl("matmul", lambda left, right, bias: left.new_empty(left.shape[0], right.shape[1]), "Meta")
    operators.impl("matmul_into", lambda *operands: None, "Meta")
    return operators  # type: ignore[no-any-return]


_OPERATORS = _register()  # which are gone with it
