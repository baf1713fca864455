"""Tokens in, logits out: the token table, the input stage of a stack, and the vocabulary projection that may share the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.nn.dropout import Dropout
from dstrain.nn.linear import Linear
from dstrain.nn.position import PositionPart, Positions
from dstrain.ops.activation import identity

_R = TypeVar("_R")


class TokenEmbedding(nn.Embedding):
    """(...) int64 -> (..., D), without initial values.

    No row is special: padding never reaches a scored position, so its row gets no gradient from here.
    """

    weight: nn.Parameter

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class FactorizedTokenEmbedding(nn.Module):
    """A narrow vector per token, an activation and a linear map to the model's width: up(activation(table[token]))."""

    def __init__(self, *, table: TokenEmbedding, activation: Callable[[Tensor], Tensor], up_proj: Linear) -> None:
        super().__init__()
        self.table = table
        self.activation = activation
        self.up_proj = up_proj

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., D)"""
        result: Tensor = self.up_proj(self.activation(self.table(tokens)))
        return result


TokenPart = TokenEmbedding | FactorizedTokenEmbedding


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
    """Hidden states (..., D) to the vocabulary: activation(output_proj(hidden)) times weight (V, E), transposed.

    weight: the model's own or the very Parameter of an embedding (tied). output_proj: D to E, None if the widths agree. back:
    (D, E), the up-projection of a tied factorized embedding, used transposed instead of output_proj, after the activation.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        activation: Callable[[Tensor], Tensor] = identity,
        output_proj: Linear | None = None,
        back: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.activation = activation
        self.output_proj = output_proj
        self.back = back

    def forward(self, hidden: Tensor, reduce: Callable[[Tensor, Tensor], _R]) -> _R:
        """`reduce(features, weight)`, called here because under ZeRO-3 the weights are whole inside this forward only."""
        return reduce(*self.operands(hidden))

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, E) and weight (V, E), whose product is the logits. For a caller who holds the weights gathered."""
        features = self.activation(hidden if self.output_proj is None else self.output_proj(hidden))
        if self.back is not None:
            features = F.linear(features, self.back.t())
        return features, self.weight
