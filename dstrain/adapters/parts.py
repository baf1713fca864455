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

from dstrain.nn.dropout import Dropout
from dstrain.nn.embedding import Projection, TokenEmbedding, embed, vocabulary_shards
from dstrain.nn.linear import Linear
from dstrain.ops.linear import linear
from dstrain.ops.vocabulary import VocabularySlice
from dstrain.parallel.collectives import copy_to, reduce_from
from dstrain.parallel.tensor import ParameterShard, even_shard

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
    return matrix if low_rank.magnitude is None else matrix * _stretch(row_lengths(matrix), low_rank.magnitude)[:, None]


def _summed_over(vocabulary: VocabularySlice | None, a: Tensor) -> Tensor:
    """A, whose gradient is the sum over the ranks, each of which adapts its own rows with it."""
    return a if vocabulary is None or vocabulary.group is None else copy_to(a, vocabulary.group)


def _stretch(lengths: Tensor, magnitude: Tensor) -> Tensor:
    """(O,), 1 at the start. A row of zeros, such as the embedding of padding, stays one."""
    return magnitude / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)


class LoraLinear(nn.Module):
    """x W^T + b + scale drop(x) A^T B^T; with DoRA, the sum without b is stretched row by row."""

    def __init__(self, base: Linear, low_rank: LowRank, *, scale: float, dropout: float) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.outputs = base.outputs
        self.inputs = base.inputs
        self.lora_a, self.lora_b, self.lora_magnitude = low_rank
        self.scale = scale
        self.dropout = Dropout(dropout, features=base.inputs)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O). If the inputs are cut, A's product is summed over the ranks, and B is whole."""
        narrow = linear(self.dropout(x), self.lora_a)
        if self.inputs is None:
            base = linear(x, self.weight, self.bias, group=self.outputs)
        else:
            narrow = reduce_from(narrow, self.inputs)
            base = reduce_from(linear(x, self.weight), self.inputs)
            base = base if self.bias is None else base + self.bias
        delta = linear(narrow, self.lora_b, group=self.outputs)
        if self.lora_magnitude is None:
            return torch.add(base, delta, alpha=self.scale)
        with torch.no_grad():
            lengths = row_lengths(torch.addmm(self.weight, self.lora_b, self.lora_a, alpha=self.scale))
            if self.inputs is not None:  # of this rank's columns; those of whole rows are wanted
                lengths = self.inputs.all_reduce(lengths.square_()).sqrt_()
        stretch = _stretch(lengths, self.lora_magnitude)
        product = base if self.bias is None else base - self.bias
        return base + (stretch - 1) * product + (self.scale * stretch) * delta

    def shards(self) -> dict[str, ParameterShard]:
        """Of the base's parameters and its adapter's."""
        if self.inputs is not None:
            return dict.fromkeys(("weight", "lora_a"), even_shard(1, self.weight.shape[1], self.inputs))
        if self.outputs is not None:
            return dict.fromkeys(
                ("weight", "bias", "lora_b", "lora_magnitude"), even_shard(0, self.weight.shape[0], self.outputs)
            )
        return {}


class LoraEmbedding(nn.Module):
    """(W + scale B A)[tokens], from the rows of the tokens only; with DoRA, from the whole matrix, which is made for it."""

    def __init__(self, base: TokenEmbedding, low_rank: LowRank, *, scale: float) -> None:
        super().__init__()
        self.weight = base.weight
        self.vocabulary = base.vocabulary
        self.lora_a, self.lora_b, self.lora_magnitude = low_rank
        self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., D)"""
        if self.lora_magnitude is not None:
            low_rank = LowRank(_summed_over(self.vocabulary, self.lora_a), self.lora_b, self.lora_magnitude)
            return embed(tokens, effective_matrix(self.weight, low_rank, self.scale), self.vocabulary)
        delta = linear(embed(tokens, self.lora_b, self.vocabulary), self.lora_a, transposed=True)
        return torch.add(embed(tokens, self.weight, self.vocabulary), delta, alpha=self.scale)

    def shards(self) -> dict[str, ParameterShard]:
        """Of the base's parameters and its adapter's."""
        return vocabulary_shards(self.vocabulary, "weight", "lora_b", "lora_magnitude")


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
        self.vocabulary = base.vocabulary
        self.activation = base.activation
        self.lora_a, self.lora_b, self.lora_magnitude = weight or (None, None, None)
        self.back_lora_a, self.back_lora_b, self.back_lora_magnitude = back or (None, None, None)
        self.scale = scale

    def forward(self, hidden: Tensor, reduce: Callable[..., _R]) -> _R:
        """`reduce(features, weight, vocabulary=...)`, as `nn.embedding.Projection` calls it."""
        return reduce(*self.operands(hidden), vocabulary=self.vocabulary)

    def shards(self) -> dict[str, ParameterShard]:
        """Of the base's parameters and its adapter's."""
        return vocabulary_shards(self.vocabulary, "weight", "lora_b", "lora_magnitude")

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, E) and the effective matrix (V, E)."""
        features = self.activation(hidden if self.output_proj is None else self.output_proj(hidden))
        if self.back is not None:
            back = self._effective(self.back, self.back_lora_a, self.back_lora_b, self.back_lora_magnitude)
            features = linear(features, back, transposed=True)
        narrow = None if self.lora_a is None else _summed_over(self.vocabulary, self.lora_a)
        return features, self._effective(self.weight, narrow, self.lora_b, self.lora_magnitude)

    def _effective(self, weight: Tensor, a: Tensor | None, b: Tensor | None, magnitude: Tensor | None) -> Tensor:
        if a is None or b is None:
            return weight
        return effective_matrix(weight, LowRank(a, b, magnitude), self.scale)
