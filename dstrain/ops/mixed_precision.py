"""Products of 16-bit matrices with sums in float32, and never rounded to 16 bits in between.

A GPU's tensor cores add in float32, and torch hands that out as `out_dtype`. A CPU has no such product in torch: there both
matrices are converted first, which computes the same. Rounded to bfloat16, a logit of 8 would be off by up to 0.016.

A CPU with AMX may then round the operands of a product of float32 matrices to it, which changes nothing in
numbers that come from bfloat16, and adds in float32: 1,024 x 128 by 128 x 7,792 on an Intel Xeon with AMX take 3.7 ms, not 14.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from dstrain.ops.kernels import matmul_kernel

_SETTING = Lock()
"""Held while the process multiplies float32 by bfloat16: two threads that restored each other's setting would leave it on."""


def matmul_into(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """`left @ right` into `out`, which may be of a wider dtype. left, right: of one dtype, or as `operand` gives them."""
    if out.dtype != left.dtype and has_fp32_output(out.device.type):
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    with _in_bfloat16(left, right, out):
        return matmul_kernel(left, right)(left.to(out.dtype), right.to(out.dtype), out=out)


def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`; `total` may be of a wider dtype. left, right: as above."""
    if total.dtype != left.dtype and has_fp32_output(total.device.type):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    with _in_bfloat16(left, right, total):
        matmul_kernel(left, right)(left.to(total.dtype), right.to(total.dtype), out=total, add=True)


def operand(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """What these products take of a matrix that is to be rounded to `dtype`: itself if the product rounds it."""
    return matrix if dtype == torch.bfloat16 and _rounds_operands(matrix) else matrix.to(dtype)


def _rounds_operands(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.dtype == torch.float32 and _cpu_multiplies_bfloat16()


@contextmanager
def _in_bfloat16(left: Tensor, right: Tensor, out: Tensor) -> Iterator[None]:
    """Products of float32 copies of these, by bfloat16 if one of them is and the CPU is faster so; as always otherwise.

    The setting is the process's: a product of other float32 numbers on another thread would be rounded too while it is on.
    """
    one_is_bfloat16 = out.dtype == torch.float32 and torch.bfloat16 in (left.dtype, right.dtype)
    # Dynamo traces neither the question to the CPU nor the setting.
    if not one_is_bfloat16 or torch.compiler.is_compiling() or out.device.type != "cpu" or not _cpu_multiplies_bfloat16():
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _SETTING:
        before, settings.fp32_precision = settings.fp32_precision, "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before


@cache
def _cpu_multiplies_bfloat16() -> bool:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 cannot say
    # With AVX512-BF16 alone oneDNN multiplies float32 as ever, setting or not: nothing is rounded, and nothing is faster.
    return bool(capabilities.get("amx_bf16", False))


@cache
def has_fp32_output(device_type: str) -> bool:
    """Whether torch has products of 16-bit matrices with a float32 result there. Asked of its dispatcher: nothing is tried."""
    key = {"cuda": "CUDA", "meta": "Meta"}.get(device_type)
    operators = ("aten::mm.dtype_out", "aten::addmm.dtype_out")
    return key is not None and all(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key) for operator in operators)


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """In which dtype autograd takes the gradient of this tensor: of a Parameter its `grad_dtype`, else the tensor's own."""
    if torch.compiler.is_compiling() or not weight.is_leaf:  # a traced graph gives each gradient the dtype of its tensor
        return weight.dtype
    chosen: torch.dtype | None = getattr(weight, "grad_dtype", None)
    return chosen or weight.dtype


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_autocast_dtype(tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype if autocast is on."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
