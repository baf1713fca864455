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
from dstrain.ops.rotary import Layout, Turn, rotate, turn

Lengths = Callable[[], Tensor]


@dataclass(frozen=True)
class Rotation:
    """How queries and new keys of one forward turn."""

    by: Turn
    layout: Layout

    def __call__(self, x: Tensor) -> Tensor:
        """(B, H, T, K) -> (B, H, T, K)"""
        return rotate(x, self.by, self.layout)


class Spectrum(NamedTuple):
    """frequency: (P,) of each pair, or (B or 1, T or 1, P) by length; amplitude: broadcasts to it."""

    frequency: Tensor
    amplitude: Tensor | float


class Rotary:
    """Fixed frequencies."""

    def __init__(self, spectrum: Spectrum, layout: Layout) -> None:
        self.spectrum = spectrum
        self.layout = layout
        self._table = Turn(torch.empty(0), torch.empty(0))

    def rotation(self, positions: Positions, reach: int, lengths: Lengths, like: Tensor) -> Rotation:
        """positions: of the new tokens, all below `reach`, up to which an offset goes. Nothing depends on `lengths`."""
        table = self._rows(reach, like)
        if isinstance(positions, int):
            return Rotation(Turn(*(part[positions:reach] for part in table)), self.layout)
        return Rotation(Turn(*(part[positions].unsqueeze(1) for part in table)), self.layout)  # (B, 1, T, P)

    def moves(self, length: int) -> bool:
        """Never."""
        return False

    def _rows(self, needed: int, like: Tensor) -> Turn:
        table = self._table.cos
        if len(table) < needed or table.device != like.device or table.dtype != like.dtype:
            with torch.inference_mode(False):
                made = turn(torch.arange(max(256, 1 << (needed - 1).bit_length())), *self.spectrum, torch.float32)
                self._table = Turn(*(part.to(like.device, like.dtype) for part in made))
        return self._table


class LengthRotary:
    """Frequencies that follow the length of each sequence.

    spectrum: lengths (B or 1, T or 1) of the sequence that each token belongs to -> `Spectrum`. same_until: up to which length
    it is the same.
    """

    def __init__(self, spectrum: Callable[[Tensor], Spectrum], layout: Layout, same_until: int) -> None:
        self.spectrum = spectrum
        self.layout = layout
        self.same_until = same_until

    def rotation(self, positions: Positions, reach: int, lengths: Lengths, like: Tensor) -> Rotation:
        """positions: of the new tokens, an offset goes up to `reach`. lengths: gives what `spectrum` takes."""
        return Rotation(turn(numbered(positions, reach, like.device), *self.spectrum(lengths()), like.dtype), self.layout)

    def moves(self, length: int) -> bool:
        """Whether a sequence of `length` tokens turns otherwise than it did one token before."""
        return length > self.same_until


RotaryPart = Rotary | LengthRotary
