"""Rotary positions as a part of a stack: the turns of one forward, made once and shared by all its layers.

Where frequencies are fixed, cosines and sines come from a table. Where they follow the length of a sequence, each further token
of a long one changes all that was computed before it, so nothing can be kept from step to step; `moves` says when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dstrain.nn.position import Positions, numbered
from dstrain.ops.rotary import CosSin, Layout, cos_sin, rotate

Lengths = Callable[[], Tensor]


@dataclass(frozen=True)
class Rotation:
    """How queries and new keys of one forward turn."""

    by: CosSin
    layout: Layout

    def __call__(self, x: Tensor) -> Tensor:
        """(B, H, T, K) -> (B, H, T, K)"""
        return rotate(x, self.by, self.layout)


class RotaryFrequencies(NamedTuple):
    """frequency: (P,) of each pair, or (B or 1, T or 1, P) by length; amplitude: broadcasts to it."""

    inv_freq: Tensor
    attention_scaling: Tensor | float


class Rotary:
    """Fixed frequencies."""

    def __init__(self, rotary_frequencies: RotaryFrequencies, layout: Layout) -> None:
        self.rotary_frequencies = rotary_frequencies
        self.layout = layout
        self._table = CosSin(torch.empty(0), torch.empty(0))

    def rotation(self, positions: Positions, end_position: int, lengths: Lengths, like: Tensor) -> Rotation:
        """positions: of the new tokens, all below `reach`, up to which an offset goes. Nothing depends on `lengths`."""
        table = self._rows(end_position, like)
        if isinstance(positions, int):
            return Rotation(CosSin(*(part[positions:end_position] for part in table)), self.layout)
        return Rotation(CosSin(*(part[positions].unsqueeze(1) for part in table)), self.layout)  # (B, 1, T, P)

    def moves(self, length: int) -> bool:
        """Never."""
        return False

    def _rows(self, needed: int, like: Tensor) -> CosSin:
        table = self._table.cos
        if len(table) < needed or table.device != like.device or table.dtype != like.dtype:
            with torch.inference_mode(False):
                made = cos_sin(torch.arange(max(256, 1 << (needed - 1).bit_length())), *self.rotary_frequencies, torch.float32)
                self._table = CosSin(*(part.to(like.device, like.dtype) for part in made))
        return self._table


class LengthRotary:
    """Frequencies that follow the length of each sequence.

    rotary_frequencies: lengths (B or 1, T or 1) of the sequence of each token -> `RotaryFrequencies`. max_static_length: the
    longest sequence up to which they do not change.
    """

    def __init__(self, rotary_frequencies: Callable[[Tensor], RotaryFrequencies], layout: Layout, max_static_length: int) -> None:
        self.rotary_frequencies = rotary_frequencies
        self.layout = layout
        self.max_static_length = max_static_length

    def rotation(self, positions: Positions, end_position: int, lengths: Lengths, like: Tensor) -> Rotation:
        """positions: of the new tokens, an offset goes up to `reach`. lengths: gives what `rotary_frequencies` takes."""
        return Rotation(
            cos_sin(numbered(positions, end_position, like.device), *self.rotary_frequencies(lengths()), like.dtype), self.layout
        )

    def moves(self, length: int) -> bool:
        """Whether a sequence of `length` tokens turns otherwise than it did one token before."""
        return length > self.max_static_length


RotaryPart = Rotary | LengthRotary
