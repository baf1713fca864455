"""Positions added to the embedding: an offset (column i of the rows is offset + i) or a number for each token, (B, T) or (N,).

Positions count 0, 1, 2, ... from the first token of a sequence. All are below `end_position`, up to which an offset goes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.errors import DataError
from dstrain.ops.lookup import lookup

Positions = int | Tensor


def numbered(positions: Positions, end_position: int, device: torch.device) -> Tensor:
    """The numbers of an offset, (T,); numbers as they are."""
    return torch.arange(positions, end_position, device=device) if isinstance(positions, int) else positions


def sinusoids(num_rows: int, dim: int) -> Tensor:
    """Rows of sines (first half) and cosines (second half) of row * 10000**(-i / (dim/2 - 1)). -> (num_rows, dim)

    tensor2tensor's form, which fairseq's checkpoints were trained with; an odd `dim` gets a column of zeros.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device="cpu") * -(math.log(10000) / max(half - 1, 1)))
    angles = torch.arange(num_rows, dtype=torch.float32, device="cpu")[:, None] * frequencies  # (rows, dim / 2)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


class SinusoidalPositions(nn.Module):
    """Fixed vectors for any length. Row r of the table belongs to position r - 2, as in fairseq, whose count starts at 2.

    The table is made in forward, in float32 on the CPU, cached for each device up to a power of two, and not in the state dict.
    """

    FIRST_ROW = 2

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.model_dim = model_dim
        self._tables: dict[torch.device, Tensor] = {}

    def forward(self, positions: Positions, end_position: int, like: Tensor) -> Tensor:
        """-> (T, D) for an offset, (..., D) for numbers; on the device and in the dtype of `like`."""
        table = self._rows(self.FIRST_ROW + end_position, like.device)
        if isinstance(positions, int):
            return table[self.FIRST_ROW + positions : self.FIRST_ROW + end_position].to(like.dtype)
        return F.embedding(positions + self.FIRST_ROW, table).to(like.dtype)

    def _rows(self, needed: int, device: torch.device) -> Tensor:
        table = self._tables.get(device)
        if table is None or table.shape[0] < needed:
            # Made under inference_mode, a cached table could not be used in training later.
            with torch.inference_mode(False):
                table = sinusoids(max(256, 1 << (needed - 1).bit_length()), self.model_dim).to(device)
            self._tables[device] = table
        return table


class LearnedPositions(nn.Module):
    """A trained vector for each of `max_length` positions."""

    def __init__(self, max_length: int, model_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, model_dim))

    def forward(self, positions: Positions, end_position: int, like: Tensor) -> Tensor:
        """-> (T, D) for an offset, (..., D) for numbers. DataError beyond the last trained position."""
        if end_position > self.weight.shape[0]:
            raise DataError(
                f"a sequence of {end_position} tokens is longer than the {self.weight.shape[0]} learned positions of the "
                "model; shorten the text, or train with a larger max_source_length / max_target_length"
            )
        return self.weight[positions:end_position] if isinstance(positions, int) else lookup(positions, self.weight)


class NoPositions(nn.Module):
    """Nothing is added: a zero that broadcasts."""

    def forward(self, positions: Positions, end_position: int, like: Tensor) -> Tensor:
        """-> ()"""
        return like.new_zeros(())


PositionPart = SinusoidalPositions | LearnedPositions | NoPositions
