"""Inverted dropout: zero each element with probability p, scale the others by 1 / (1 - p). For training only.

With `bits` (`random_bits.py`, 16 an element) the mask is a function of them: an element is dropped if its bits, as a signed
number, are among the round(65536 p) smallest. So p is met to within 1/131072, and the scale is that of the probability really
used. Without bits torch's generator draws, one number an element: on a CPU a quarter of a step of a small model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.ops.random_bits import random_bits

_LEVELS = 1 << 16


class CountedMask(NamedTuple):
    """What to drop of (tokens, features). keys: (...) int64, of each token; start: the number of the first feature."""

    p: float
    keys: Tensor
    start: int = 0


def counted_dropout(x: Tensor, mask: CountedMask, residual: Tensor | None = None) -> Tensor:
    """dropout(x), to which the residual is added if there is one. (..., D) -> (..., D)"""
    bits = random_bits(mask.keys, mask.start, mask.start + x.shape[-1])
    return dropout(x, mask.p, bits) if residual is None else dropout_add(residual, x, mask.p, bits)


def dropout(x: Tensor, p: float, bits: Tensor | None = None) -> Tensor:
    """(...) -> (...). bits: (...) int16."""
    if p == 0:
        return x
    if bits is None:
        return F.dropout(x, p)
    kept, scale = _kept(x, p, bits)
    return x * kept.mul_(scale)


def dropout_add(residual: Tensor, x: Tensor, p: float, bits: Tensor | None = None) -> Tensor:
    """residual + dropout(x), with bits in one pass over memory."""
    if p == 0:
        return residual + x
    if bits is None:
        return residual + F.dropout(x, p)
    kept, scale = _kept(x, p, bits)
    return torch.addcmul(residual, x, kept, value=scale)


def kept_bits(p: float) -> tuple[int, float]:
    """The lowest bits, as a signed number, with which an element is kept, and the scale of what is kept."""
    threshold = min(round(p * _LEVELS), _LEVELS - 1)  # of the 65536 values of 16 bits so many drop an element
    return threshold - _LEVELS // 2, _LEVELS / (_LEVELS - threshold)


def _kept(x: Tensor, p: float, bits: Tensor) -> tuple[Tensor, float]:
    """Ones and zeros of the shape and dtype of x, and the scale of what is kept."""
    lowest, scale = kept_bits(p)
    if torch.compiler.is_compiling():  # which makes a graph for each size of an `out`
        return bits.ge(lowest).to(x.dtype), scale
    return torch.ge(bits, lowest, out=x.new_empty(x.shape)), scale
