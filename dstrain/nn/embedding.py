"""Tokens in, logits out: the token table, the input stage of a stack, and the vocabulary projection that may share the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dstrain.nn.dropout import Dropout
from dstrain.nn.position import PositionPart, Positions

R = TypeVar("R")


class TokenEmbedding(nn.Embedding):
    """(...) int64 -> (..., D), without initial values.

    No row is special: padding never reaches a scored position, so its row gets no gradient from here.
    """

    weight: nn.Parameter

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class InputEmbedding(nn.Module):
    """dropout(norm(scale * token + position)).

    tokens: maps ids to vectors, may be shared between both sides. norm: `nn.Identity` for none.
    """

    def __init__(
        self, *, tokens: nn.Module, positions: PositionPart, norm: nn.Module, dropout: Dropout, model_dim: int, scaled: bool
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.norm = norm
        self.dropout = dropout
        self.scale = math.sqrt(model_dim) if scaled else 1.0

    def forward(self, tokens: Tensor, positions: Positions) -> Tensor:
        """(B, T) -> (B, T, D)"""
        x = self.tokens(tokens)
        x = torch.add(self.positions(positions, tokens.shape[1], x), x, alpha=self.scale)
        result: Tensor = self.dropout(self.norm(x))
        return result


class Projection(nn.Module):
    """Features to the vocabulary. weight: (V, D), the model's own or the very Parameter of an embedding (tied)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, reduce: Callable[[Tensor, Tensor], R]) -> R:
        """`reduce(features, weight)`, called here because the weight is only whole inside this forward under ZeRO-3."""
        return reduce(hidden, self.weight)
