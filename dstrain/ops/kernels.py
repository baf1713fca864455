"""Which kernel runs an op: a table by device, dtype, problem size and installed packages. No other module chooses.

A kernel is in the table if it is certain to be the faster one there. Nothing is measured at start or read from the machine, so a
resumed run chooses as before and repeats the losses bit for bit. All kernels of an op compute the same; tests hold each to the
op's reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.ops.cpu.argmax import numpy_argmax
from dstrain.ops.cpu.attention import batched_attention, counted_dropout_attention
from dstrain.ops.packed_attention import PackedPair, RowAttention, flex, padded_rows, varlen

Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Kernel(Generic[Function]):
    """One implementation, and its conditions.

    device_type, dtypes: those it is for, None for all. max_size: the largest problem it is for, in the op's unit, None for all.
    package: that must be installed.
    """

    name: str
    function: Function
    device_type: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    max_size: int | None = None
    package: str | None = None

    def fits(self, device_type: str, dtype: torch.dtype) -> bool:
        """Whether it can run there."""
        right_device = self.device_type in {None, device_type}
        return right_device and (self.dtypes is None or dtype in self.dtypes) and self.is_installed

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or find_spec(self.package) is not None

    def condition(self, unit: str) -> str:
        """Its conditions in words. unit: of the size."""
        words = [self.device_type or "any device"]
        if self.dtypes is not None:
            words.append(" or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
        if self.max_size is not None:
            words.append(f"up to {self.max_size} {unit}")
        if self.package is not None:
            words.append(self.package + ("" if self.is_installed else " (not installed)"))
        return ", ".join(words)


class Op(Generic[Function]):
    """The kernels of one op; the first that fits is chosen, the last fits everywhere. unit: of the problem's size."""

    def __init__(self, name: str, kernels: Sequence[Kernel[Function]], unit: str = "") -> None:
        self.name = name
        self.kernels = tuple(kernels)
        self.unit = unit
        self._fitting = cache(self._find_fitting)
        self._forced: Kernel[Function] | None = None

    def choose(self, device: torch.device, dtype: torch.dtype, size: int = 0) -> Function:
        """The kernel for a problem of this size."""
        if self._forced is not None:
            return self._forced.function
        fitting = self._fitting(device.type, dtype)
        return next(kernel.function for kernel in fitting if kernel.max_size is None or size <= kernel.max_size)

    @contextmanager
    def forced(self, name: str) -> Iterator[None]:
        """Always take the kernel of this name, for tests."""
        before, self._forced = self._forced, next(kernel for kernel in self.kernels if kernel.name == name)
        try:
            yield
        finally:
            self._forced = before

    def _find_fitting(self, device_type: str, dtype: torch.dtype) -> tuple[Kernel[Function], ...]:
        return tuple(kernel for kernel in self.kernels if kernel.fits(device_type, dtype))


def fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """torch's own, which picks among several."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal)


def fused_dropout_attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None, causal: bool, dropout: float, mask_keys: Tensor
) -> Tensor:
    """torch's own, whose generator draws."""
    grouped = len(key[0]) != len(query[0])
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )


def torch_argmax(scores: Tensor) -> Tensor:
    """(n, V) -> (n, 1)"""
    return scores.argmax(1, keepdim=True)


TRAINING_ATTENTION: Op[Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]] = Op(
    "training_attention",
    [
        Kernel("batched_products", batched_attention, "cpu", (torch.float32,), max_size=400),
        Kernel("batched_products", batched_attention, "cpu", (torch.bfloat16,), max_size=40_000),
        Kernel("scaled_dot_product_attention", fused_attention),
    ],
    unit="scores per head",
)
"""Attention with gradient, with as many key as query heads and no dropout. Size: T x S."""

DROPOUT_ATTENTION: Op[Callable[..., Tensor]] = Op(
    "dropout_attention",
    [
        Kernel("counted_masks", counted_dropout_attention, "cpu"),
        Kernel("scaled_dot_product_attention", fused_dropout_attention),
    ],
)
"""Attention with dropout of its probabilities. The kernels of a GPU draw from torch's generator, each rank other masks."""

PackedAttention = Callable[[Tensor, Tensor, Tensor, PackedPair, RowAttention], Tensor]

PACKED_ATTENTION: Op[PackedAttention] = Op(
    "packed_attention",
    [Kernel("varlen", varlen, "cuda", (torch.bfloat16, torch.float16)), Kernel("padded_rows", padded_rows)],
)
"""Attention of packed sequences, without ALiBi and dropout."""

PACKED_ALIBI_ATTENTION: Op[PackedAttention] = Op(
    "packed_alibi_attention", [Kernel("flex", flex, "cuda"), Kernel("padded_rows", padded_rows)]
)
"""Attention of packed sequences with ALiBi, without dropout."""

ARGMAX: Op[Callable[[Tensor], Tensor]] = Op(
    "argmax", [Kernel("numpy", numpy_argmax, "cpu", (torch.float32, torch.float64)), Kernel("torch", torch_argmax)]
)
"""The index of the maximum of each row, the first of equal ones."""

OPS = (TRAINING_ATTENTION, DROPOUT_ATTENTION, PACKED_ATTENTION, PACKED_ALIBI_ATTENTION, ARGMAX)


def describe_kernels() -> str:
    """The table in words, a line per kernel in the order of choice."""
    return "\n".join(f"{op.name:20} {kernel.name:30} {kernel.condition(op.unit)}" for op in OPS for kernel in op.kernels)
