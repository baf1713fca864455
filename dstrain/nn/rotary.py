"""Rotary positions as a module of a stack: the cosines and sines of one forward, made once and shared by all its layers.

With fixed frequencies they are rows of a table, cached for each device and dtype. If the frequencies depend on the length of a
sequence, each further token of a long one changes everything computed before it, so nothing can be kept from step to step;
`invalidates_cache` says when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dstrain.nn.position import Positions, numbered
from dstrain.ops.kernels import ROTATION
from dstrain.ops.rotary import CosSin, RotaryLayout, compute_cos_sin

LazyLengths = Callable[[], Tensor]


@dataclass(frozen=True)
class Rotation:
    """The rotation of queries and new keys of one forward."""

    cos_sin: CosSin
    layout: RotaryLayout

    def __call__(self, x: Tensor) -> Tensor:
        """(..., H, T, K) -> (..., H, T, K)"""
        return ROTATION.choose(x.device, x.dtype)(x, self.cos_sin, self.layout)


class RotaryFrequencies(NamedTuple):
    """inv_freq: (P,) of each pair, or (B or 1, T or 1, P), packed (N, P), by length; attention_scaling: broadcasts to it."""

    inv_freq: Tensor
    attention_scaling: Tensor | float


class Rotary:
    """Fixed frequencies. rotary_frequencies: makes them, float32 on the CPU."""

    def __init__(self, rotary_frequencies: Callable[[], RotaryFrequencies], layout: RotaryLayout) -> None:
        self.rotary_frequencies = rotary_frequencies
        self.layout = layout
        self._tables: dict[tuple[torch.device, torch.dtype], CosSin] = {}

    def rotation(self, positions: Positions, end_position: int, lengths: LazyLengths, like: Tensor) -> Rotation:
        """positions: of the new tokens, all below `end_position`, up to which an offset goes. Nothing depends on `lengths`."""
        table = self._rows(end_position, like)
        if isinstance(positions, int):
            return Rotation(CosSin(*(part[positions:end_position] for part in table)), self.layout)
        return Rotation(CosSin(*(part[positions].unsqueeze(-3) for part in table)), self.layout)  # (B or none, 1, T, P)

    def invalidates_cache(self, length: int) -> bool:
        """Never."""
        return False

    def _rows(self, needed: int, like: Tensor) -> CosSin:
        table = self._tables.get((like.device, like.dtype))
        if table is None or len(table.cos) < needed:
            # Made under inference_mode, a cached table could not be used in training later.
            with torch.inference_mode(False):
                positions = torch.arange(max(256, 1 << (needed - 1).bit_length()), device="cpu")
                exact = compute_cos_sin(positions, *self.rotary_frequencies(), torch.float32)
                table = CosSin(*(part.to(like.device, like.dtype) for part in exact))
            self._tables[like.device, like.dtype] = table
        return table


class LengthRotary:
    """Frequencies that follow the length of each sequence.

    rotary_frequencies: lengths (B or 1, T or 1), packed (N,), of the sequence of each token -> `RotaryFrequencies`.
    max_static_length: the longest sequence up to which they do not change.
    """

    def __init__(
        self, rotary_frequencies: Callable[[Tensor], RotaryFrequencies], layout: RotaryLayout, max_static_length: int
    ) -> None:
        self.rotary_frequencies = rotary_frequencies
        self.layout = layout
        self.max_static_length = max_static_length

    def rotation(self, positions: Positions, end_position: int, lengths: LazyLengths, like: Tensor) -> Rotation:
        """positions: of the new tokens, an offset goes up to `end_position`. lengths: gives what `rotary_frequencies` takes."""
        return Rotation(
            compute_cos_sin(numbered(positions, end_position, like.device), *self.rotary_frequencies(lengths()), like.dtype),
            self.layout,
        )

    def invalidates_cache(self, length: int) -> bool:
        """Whether the frequencies of a sequence of `length` tokens differ from those one token before."""
        return length > self.max_static_length


RotaryPart = Rotary | LengthRotary
