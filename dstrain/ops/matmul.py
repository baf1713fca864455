"""Matrix products and linear maps, on the CPU by the faster of two libraries.

torch's wheels multiply with Intel's MKL, which on AMD processors runs at three quarters of the speed of OpenBLAS, the library
inside numpy's wheels; and matrix products are three quarters of a training step. So where that is known to be faster, float32
products of matrices with no side under `MIN_SIDE` go through numpy, on the tensors' own memory: nothing is copied. Known means:
an AMD processor, numpy with OpenBLAS, one thread a process (OMP_NUM_THREADS=1, which both libraries obey). It is a rule and not
a measurement at start, so that a resumed run chooses alike and repeats the losses bit for bit.

Everywhere else, and for other dtypes, small matrices, autocast and tracing, it is torch. tools/README.md has the figures.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MIN_SIDE = 64
"""With a shorter side numpy's call costs more than its product saves."""


def numpy_is_faster(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this process should multiply through numpy; see the head of this file."""
    amd = cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()
    blas = np.__config__.CONFIG["Build Dependencies"]["blas"]["name"]
    return amd and "openblas" in blas and os.environ.get("OMP_NUM_THREADS") == "1"


_NUMPY_IS_FASTER = numpy_is_faster()


def matmul(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """(N, K) @ (K, M) into out (N, M), all of one dtype; not recorded by autograd. Returns out."""
    if _suits_numpy(min(*left.shape, right.shape[1]), left, right, out):
        np.matmul(_array(left), _array(right), out=out.detach().numpy())
        return out
    return torch.mm(left, right, out=out)


def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right. total: (N, M), left: (N, K), right: (K, M), all of one dtype; not recorded by autograd."""
    if _suits_numpy(min(*left.shape, right.shape[1]), left, right, total):
        total.add_(matmul(left, right, out=torch.empty_like(total)))
    else:
        total.addmm_(left, right)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, recorded by autograd. x: (..., I), weight: (O, I), bias: (O,) -> (..., O)"""
    shortest = min(x.shape[:-1].numel(), *weight.shape)
    if not _suits_numpy(shortest, x, weight) or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    """`F.linear` with all its products through `matmul`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, I)
        ctx.save_for_backward(rows, weight)
        result = matmul(rows, weight.t(), out=x.new_empty(len(rows), len(weight)))
        if bias is not None:
            result.add_(bias)
        return result.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        x_learns, weight_learns, bias_learns = ctx.needs_input_grad
        slope_rows = slope.reshape(-1, len(weight))  # (N, O)
        x_gradient = weight_gradient = None
        if x_learns:
            x_gradient = matmul(slope_rows, weight, out=slope.new_empty(rows.shape)).view(*slope.shape[:-1], rows.shape[1])
        if weight_learns:
            weight_gradient = matmul(slope_rows.t(), rows, out=slope.new_empty(weight.shape))
        return x_gradient, weight_gradient, slope_rows.sum(0) if bias_learns else None


def _suits_numpy(shortest_side: int, *matrices: Tensor) -> bool:
    """Whether a product is numpy's to make."""
    return (
        _NUMPY_IS_FASTER
        and shortest_side >= MIN_SIDE
        and all(matrix.dtype == torch.float32 and matrix.device.type == "cpu" for matrix in matrices)
    )


def _array(matrix: Tensor) -> NDArray[Any]:
    """The matrix as BLAS reads it: one stride is 1, the other spans a row; anything else is copied into place."""
    row, column = matrix.stride()
    if not (column == 1 and row >= matrix.shape[1]) and not (row == 1 and column >= matrix.shape[0]):
        matrix = matrix.contiguous()
    array: NDArray[Any] = matrix.detach().numpy()
    return array
