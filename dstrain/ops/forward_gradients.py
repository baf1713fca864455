"""A sum over tokens whose gradients are made in forward, while the logits of a chunk exist, and scaled in backward.

What all losses do that walk through a vocabulary projection in chunks; each brings its own walk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = tuple[Tensor | None, Tensor | None]
Walk = Callable[[Tensor, Tensor], tuple[tuple[Tensor, ...], Gradients]]
"""(features, weight) -> () sums, and the gradients of the first one with respect to both, None where not asked for."""


def sums_with_gradients(features: Tensor, weight: Tensor, walk: Walk) -> tuple[Tensor, ...]:
    """The sums of a walk, the first with gradient to features and weight, the others without. The weight is never kept."""
    sums: tuple[Tensor, ...] = _Walked.apply(features, weight, walk)  # type: ignore[no-untyped-call]
    return sums


class _Walked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, walk: Walk) -> tuple[Tensor, ...]:
        with torch.autocast(features.device.type, enabled=False):
            sums, gradients = walk(features, weight)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = features.dtype, weight.dtype
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if gradient is None else (gradient * loss_gradient).to(dtype) for gradient, dtype in gradients]
        return *scaled, None
