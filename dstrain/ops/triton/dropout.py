"""Counted dropout: the mask is made again wherever it is needed, from the keys of the tokens, and never stored.

The bits are those of `ops/random_bits.py`, so a mask is the same on every device.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.ops.dropout import CountedMask, kept_bits
from dstrain.ops.random_bits import FEATURES_PER_WORD, FIRST_FACTOR, SECOND_FACTOR, word_counters
from dstrain.ops.triton.launch import as_rows, block_for, warps_for

_FIRST: tl.constexpr = tl.constexpr(FIRST_FACTOR)
_SECOND: tl.constexpr = tl.constexpr(SECOND_FACTOR)
_PER_WORD: tl.constexpr = tl.constexpr(FEATURES_PER_WORD)


class MaskArguments(NamedTuple):
    """Of a kernel. keys: (n,) int64; counters: of the words; skipped: features of the first word before the first one of x."""

    keys: Tensor
    counters: Tensor
    skipped: int
    lowest: int
    scale: float

    @classmethod
    def of(cls, mask: CountedMask, features: int) -> "MaskArguments":
        """For so many features."""
        first, last = mask.start // FEATURES_PER_WORD, -(-(mask.start + features) // FEATURES_PER_WORD)
        keys = mask.keys.reshape(-1).contiguous()
        return cls(keys, word_counters(first, last, keys.device), mask.start % FEATURES_PER_WORD, *kept_bits(mask.p))


def triton_dropout(x: Tensor, mask: CountedMask, residual: Tensor | None = None) -> Tensor:
    """See `counted_dropout`."""
    if mask.p == 0:
        return x if residual is None else residual + x
    dropped: Tensor = _Dropout.apply(x, residual, mask)
    return dropped


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, mask: CountedMask) -> Tensor:
        ctx.mask = mask
        return _dropped(x, residual, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad = _dropped(grad, None, ctx.mask) if ctx.needs_input_grad[0] else None
        return x_grad, grad if ctx.needs_input_grad[1] else None, None


def _dropped(x: Tensor, residual: Tensor | None, mask: CountedMask) -> Tensor:
    rows, features = as_rows(x), x.shape[-1]
    added = rows if residual is None else as_rows(residual)
    out = rows.new_empty(rows.shape)
    block = block_for(features)
    if len(rows):
        _dropout_kernel[(len(rows), triton.cdiv(features, block))](
            rows,
            added,
            out,
            *MaskArguments.of(mask, features),
            features,
            rows.stride(0),
            added.stride(0),
            RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return out.view(x.shape)


@triton.jit
def kept_scale(key, counters, columns, inside, skipped, lowest, scale):
    """`scale` where a feature of this row is kept, else 0."""
    features = columns + skipped
    word = key ^ tl.load(counters + features // _PER_WORD, mask=inside, other=0)
    word = word * _FIRST
    word += word >> 32  # arithmetic shifts, as in random_bits.py
    word = word * _SECOND
    word += word >> 32
    bits = (word >> ((features % _PER_WORD) * 16).to(tl.int64)).to(tl.int16)
    return tl.where(bits.to(tl.int32) >= lowest, scale, 0.0)


@triton.jit
def _dropout_kernel(
    x,
    residual,
    out,
    keys,
    counters,
    skipped,
    lowest,
    scale,
    features,
    x_stride,
    residual_stride,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    kept = kept_scale(tl.load(keys + row), counters, columns, inside, skipped, lowest, scale)
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32) * kept
    if RESIDUAL:
        value += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * features + columns, value.to(out.dtype.element_ty), mask=inside)
