"""Products in the inputs' dtype, sums in a wider one: what the chunked losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from dstrain.ops.matmul import add_matmul, matmul


def product(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """`left @ right` into `out`, which may be of a wider dtype."""
    if out.dtype == left.dtype:
        return matmul(left, right, out=out)
    return out.copy_(torch.mm(left, right))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, where `total` may be of a wider dtype."""
    if total.dtype == left.dtype:
        add_matmul(total, left, right)
    else:
        total.add_(torch.mm(left, right))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What is summed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype where autocast is on."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
