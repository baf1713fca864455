"""Inverted dropout: zero each element with probability p, scale the others by 1 / (1 - p). For training only."""

from torch import Tensor

from dstrain.ops.kernels import DROPOUT


def dropout(x: Tensor, p: float) -> Tensor:
    """(...) -> (...)"""
    return DROPOUT.choose(x.device, x.dtype)(None, x, p) if p else x


def dropout_add(residual: Tensor, x: Tensor, p: float) -> Tensor:
    """residual + dropout(x)"""
    return DROPOUT.choose(x.device, x.dtype)(residual, x, p) if p else residual + x
