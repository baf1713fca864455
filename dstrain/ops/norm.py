"""LayerNorm and RMSNorm, of an input or of its sum with a residual."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class NormWeights(NamedTuple):
    """weight: (D,); bias: (D,) or None. centered: the mean is subtracted (LayerNorm), or not (RMSNorm)."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool


class NormedSum(NamedTuple):
    """total: what was normed, the sum with the residual or the input itself. normed: its norm. (..., D) both."""

    total: Tensor
    normed: Tensor


def plain_norm(x: Tensor, norm: NormWeights) -> Tensor:
    """(..., D) -> (..., D)"""
    if norm.centered:
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
