"""LayerNorm and RMSNorm, of an input or of its sum with a residual."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from dstrain.ops.dropout import CountedMask, counted_dropout


class NormWeights(NamedTuple):
    """weight: (D,); bias: (D,) or None. centered: the mean is subtracted (LayerNorm), or not (RMSNorm)."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool


def composed_norm(x: Tensor, norm: NormWeights, residual: Tensor | None = None, mask: CountedMask | None = None) -> Tensor:
    """The norm of x, or of residual + x, of which `mask` drops elements. (..., D) -> (..., D)"""
    if residual is not None:
        x = residual + x if mask is None else counted_dropout(x, mask, residual)
    if norm.centered:
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
