"""Products of 16-bit matrices with sums in float32, and never rounded to 16 bits in between.

A GPU's tensor cores add in float32, and torch hands that out as `out_dtype`. A CPU has no such product in torch: there both
matrices are converted first, which computes the same. Rounded to bfloat16, a logit of 8 would be off by up to 0.016.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def matmul_into(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """`left @ right` into `out`, which may be of a wider dtype."""
    if out.dtype != left.dtype and has_fp32_output(out.device.type):
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`; `total` may be of a wider dtype."""
    if total.dtype != left.dtype and has_fp32_output(total.device.type):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), out=total)


@cache
def has_fp32_output(device_type: str) -> bool:
    """Whether torch has products of 16-bit matrices with a float32 result there. Asked of its dispatcher: nothing is tried."""
    key = {"cuda": "CUDA", "meta": "Meta"}.get(device_type)
    operators = ("aten::mm.dtype_out", "aten::addmm.dtype_out")
    return key is not None and all(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key) for operator in operators)


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_autocast_dtype(tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype if autocast is on."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
