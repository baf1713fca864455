"""Modules with low-rank adapters: linear map, token table, vocabulary projection.

Each replaces a plain module and holds the same Parameters under the same names, with `lora_a`, `lora_b` and, for
DoRA, `lora_magnitude` beside them; so no name of the base moves. For a matrix W (O, I), A is (R, I) and B is (O, R). B starts at
zero, so a fresh adapter changes nothing, bit for bit. Parameters belong directly to the module that computes with them, because
ZeRO-3 gathers those of a module when its forward begins.

DoRA's effective matrix is m (W + scale B A) / |W + scale B A| with magnitudes m, |.| over rows, and no gradient through |.|
(Liu et al. 2024, section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.nn.dropout import Dropout
from dstrain.nn.embedding import Projection, TokenEmbedding
from dstrain.nn.linear import Linear

_R = TypeVar("_R")


class LowRank(NamedTuple):
    """The trained tensors of one matrix (O, I). a: (R, I); b: (O, R); magnitude: (O,) for DoRA, else None."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


def row_lengths(matrix: Tensor) -> Tensor:
    """(O, I) -> (O,), without gradient."""
    lengths: Tensor = torch.linalg.vector_norm(matrix.detach(), dim=1)
    return lengths


def effective_matrix(weight: Tensor, low_rank: LowRank, scale: float) -> Tensor:
    """The matrix that a weight and its adapter amount to. (O, I) -> (O, I)"""
    matrix = torch.addmm(weight, low_rank.b, low_rank.a, alpha=scale)
    return matrix if low_rank.magnitude is None else matrix * _stretch(matrix, low_rank.magnitude)[:, None]


def _stretch(matrix: Tensor, magnitude: Tensor) -> Tensor:
    """(O,), 1 at the start. A row of zeros, such as the embedding of padding, stays one."""
    return magnitude / row_lengths(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)


class LoraLinear(nn.Module):
    """x W^T + b + scale drop(x) A^T B^T; with DoRA, the sum without b is stretched row by row."""

    def __init__(self, base: Linear, low_rank: LowRank, *, scale: float, dropout: float) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.lora_a, self.lora_b, self.lora_magnitude = low_rank
        self.scale = scale
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        base = F.linear(x, self.weight, self.bias)
        delta = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        if self.lora_magnitude is None:
            return torch.add(base, delta, alpha=self.scale)
        with torch.no_grad():
            matrix = torch.addmm(self.weight, self.lora_b, self.lora_a, alpha=self.scale)
        stretch = _stretch(matrix, self.lora_magnitude)
        product = base if self.bias is None else base - self.bias
        return base + (stretch - 1) * product + (self.scale * stretch) * delta


class LoraEmbedding(nn.Module):
    """(W + scale B A)[tokens], from the rows of the tokens only; with DoRA, from the whole matrix, which is made for it."""

    def __init__(self, base: TokenEmbedding, low_rank: LowRank, *, scale: float) -> None:
        super().__init__()
        self.weight = base.weight
        self.lora_a, self.lora_b, self.lora_magnitude = low_rank
        self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., D)"""
        if self.lora_magnitude is not None:
            low_rank = LowRank(self.lora_a, self.lora_b, self.lora_magnitude)
            return F.embedding(tokens, effective_matrix(self.weight, low_rank, self.scale))
        delta = torch.matmul(F.embedding(tokens, self.lora_b), self.lora_a)
        return torch.add(F.embedding(tokens, self.weight), delta, alpha=self.scale)


class LoraProjection(nn.Module):
    """Features to the vocabulary by an adapted matrix, by an adapted way back to a factorized embedding, or both.

    `reduce` gets the effective matrix, made in each forward, as a chunked loss takes a projection as one matrix. That
    is V x E values and as many for its gradient (features and matrix widened by R columns would copy the matrix just the same).
    It is not kept after `reduce` has returned, as ZeRO-3 requires.
    """

    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_magnitude: Tensor | None
    back_lora_a: Tensor | None
    back_lora_b: Tensor | None
    back_lora_magnitude: Tensor | None

    def __init__(self, base: Projection, *, weight: LowRank | None, back: LowRank | None, scale: float) -> None:
        super().__init__()
        self.weight = base.weight
        self.output_proj = base.output_proj
        self.back = base.back
        self.activation = base.activation
        self.lora_a, self.lora_b, self.lora_magnitude = weight or (None, None, None)
        self.back_lora_a, self.back_lora_b, self.back_lora_magnitude = back or (None, None, None)
        self.scale = scale

    def forward(self, hidden: Tensor, reduce: Callable[[Tensor, Tensor], _R]) -> _R:
        """`reduce(features, weight)`, as `nn.embedding.Projection` calls it."""
        return reduce(*self.operands(hidden))

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, E) and the effective matrix (V, E)."""
        features = self.activation(hidden if self.output_proj is None else self.output_proj(hidden))
        if self.back is not None:
            back = self._effective(self.back, self.back_lora_a, self.back_lora_b, self.back_lora_magnitude)
            features = F.linear(features, back.t())
        return features, self._effective(self.weight, self.lora_a, self.lora_b, self.lora_magnitude)

    def _effective(self, weight: Tensor, a: Tensor | None, b: Tensor | None, magnitude: Tensor | None) -> Tensor:
        if a is None or b is None:
            return weight
        return effective_matrix(weight, LowRank(a, b, magnitude), self.scale)
