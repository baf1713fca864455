"""Inverted dropout: zero each element with probability p, scale the others by 1 / (1 - p).

On the CPU torch draws one Bernoulli number per element; in a small model that is a quarter of a training step. Here four
elements share one 64-bit draw: each compares its 16 bits with round(65536 p), so p is met to within 1/131072 and the scale is
that of the probability really used. About seven times as fast, from torch's own generator, so that seeding works. On a GPU
torch's fused kernel is used.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_LEVELS = 1 << 16


def _threshold(p: float) -> int:
    """How many of the 65536 values of 16 random bits drop an element."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def _kept(like: Tensor, threshold: int) -> Tensor:
    """Ones and zeros of the shape and dtype of `like`; each is zero with probability threshold / 65536."""
    draws = torch.empty((like.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: like.numel()].view(like.shape)
    return torch.ge(bits, threshold - _LEVELS // 2, out=like.new_empty(like.shape))


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout of `x`; for training only."""
    if p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    threshold = _threshold(p)
    return x * _kept(x, threshold).mul_(_LEVELS / (_LEVELS - threshold))


def dropout_add(residual: Tensor, x: Tensor, p: float) -> Tensor:
    """residual + dropout(x), in one pass over memory."""
    if p == 0:
        return residual + x
    if x.device.type != "cpu":
        return residual + F.dropout(x, p)
    threshold = _threshold(p)
    return torch.addcmul(residual, x, _kept(x, threshold), value=_LEVELS / (_LEVELS - threshold))


def dropout_reference(x: Tensor, p: float) -> Tensor:
    """Torch's own dropout: the same distribution, other draws."""
    return F.dropout(x, p)
