"""The pieces of a tensor along its last dimension, as of `torch.split`, whose gradient is not copied if it lies in one piece.

torch's own concatenates the gradients of the pieces. Kernels of attention write those of queries, keys and values side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """(..., O) -> one (..., size) for each, views of it. sizes: their sum is O."""
    if not torch.is_grad_enabled() or not x.requires_grad or torch.compiler.is_compiling():
        return torch.split(x, list(sizes), dim=-1)
    pieces: tuple[Tensor, ...] = _Split.apply(x, sizes)  # type: ignore[no-untyped-call]
    return pieces


def whole(pieces: Sequence[Tensor]) -> Tensor | None:
    """The tensor that these are the pieces of, in its memory: (..., size) each -> (..., O), contiguous; None if there is none."""
    first, size = pieces[0], sum(piece.shape[-1] for piece in pieces)
    shape = (*first.shape[:-1], size)
    strides = [1]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    offset = first.storage_offset()
    for piece in pieces:
        lengths = zip(piece.shape, piece.stride(), strides, strict=True)
        if (
            piece.numel() == 0
            or piece.dtype != first.dtype
            or not share_memory(piece, first)
            or piece.storage_offset() != offset
            or any(length > 1 and stride != expected for length, stride, expected in lengths)
        ):
            return None
        offset += piece.shape[-1]
    return first.as_strided(shape, strides)


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether both are views of one storage; also of tensors without memory, on a device that is only played."""
    return bool(first.untyped_storage()._cdata == second.untyped_storage()._cdata)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.sizes = x.shape, sizes
        return torch.split(x, list(sizes), dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        present = [grad for grad in grads if grad is not None]
        if len(present) == len(grads) and (grad := whole(present)) is not None:
            return grad, None
        like = present[0]  # a Function without any gradient is not called
        shapes = ((*ctx.shape[:-1], size) for size in ctx.sizes)
        parts = [like.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, shapes, strict=True)]
        return torch.cat(parts, -1), None
