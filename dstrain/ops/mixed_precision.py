"""Products in the inputs' dtype, sums in a wider one."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_into(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """`left @ right` into `out`, which may be of a wider dtype."""
    return torch.mm(left, right, out=out) if out.dtype == left.dtype else out.copy_(torch.mm(left, right))


def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`; `total` may be of a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_autocast_dtype(tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype if autocast is on."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
