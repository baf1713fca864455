"""Tokens in, logits out: the token table, the input stage of a stack, and the vocabulary projection that may share the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.batch import Sequences
from dstrain.nn.dropout import EMBEDDING_SITE, NO_MASKS, Dropout, MaskKeys
from dstrain.nn.linear import Linear
from dstrain.nn.position import PositionPart, Positions
from dstrain.ops.activation import identity
from dstrain.ops.linear import linear
from dstrain.ops.lookup import lookup
from dstrain.ops.vocabulary import VocabularySlice
from dstrain.parallel.collectives import reduce_from
from dstrain.parallel.group import Group
from dstrain.parallel.tensor import ParameterShard, vocabulary_shard

_R = TypeVar("_R")


def vocabulary_slice(vocab_size: int, entries: Group | None) -> VocabularySlice | None:
    """This rank's entries of a table or projection that is cut over the group `entries`; None for a whole one."""
    if entries is None:
        return None
    shard = vocabulary_shard(vocab_size, entries)
    return VocabularySlice(shard.start, shard.stop, vocab_size, entries)


def vocabulary_shards(vocabulary: VocabularySlice | None, *names: str) -> dict[str, ParameterShard]:
    """Of parameters with a row for each entry."""
    if vocabulary is None:
        return {}
    return dict.fromkeys(names, ParameterShard(0, vocabulary.start, vocabulary.stop, vocabulary.vocab_size))


def embed(tokens: Tensor, table: Tensor, vocabulary: VocabularySlice | None) -> Tensor:
    """Rows of a table, of which this rank has those of `vocabulary`. (...), (V, D) -> (..., D)"""
    if vocabulary is None or vocabulary.group is None:
        return lookup(tokens, table)
    is_local = (tokens >= vocabulary.start) & (tokens < vocabulary.stop)
    local = lookup((tokens - vocabulary.start).masked_fill(~is_local, 0), table)
    return reduce_from(local.masked_fill(~is_local.unsqueeze(-1), 0), vocabulary.group)


class TokenEmbedding(nn.Embedding):
    """(...) int64 -> (..., D), without initial values. entries: the tensor group over which the table is cut, or None.

    No row is special: padding never reaches a scored position, so its row gets no gradient from here.
    """

    weight: nn.Parameter

    def __init__(self, vocab_size: int, dim: int, *, entries: Group | None = None) -> None:
        self.vocabulary = vocabulary_slice(vocab_size, entries)
        super().__init__(vocab_size if self.vocabulary is None else len(self.vocabulary), dim)

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) -> (..., D)"""
        return embed(tokens, self.weight, self.vocabulary)

    def shards(self) -> dict[str, ParameterShard]:
        """Of the weight."""
        return vocabulary_shards(self.vocabulary, "weight")


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

    def forward(self, tokens: Tensor, positions: Positions, end_position: int) -> Tensor:
        """(...) -> (..., D). positions: all below `end_position`, up to which an offset goes."""
        x = self.tokens(tokens)
        x = torch.add(self.positions(positions, end_position, x), x, alpha=self.scale)
        result: Tensor = self.dropout(self.norm(x))
        return result

    def embed(self, sequences: Sequences, masks: MaskKeys = NO_MASKS) -> Tensor:
        """Of whole sequences: (B, T) -> (B, T, D), (N,) -> (N, D). masks: what the tokens draw dropout by."""
        with masks.at(EMBEDDING_SITE):
            result: Tensor = self(sequences.tokens, sequences.positions, sequences.end_position)
        return result


class Projection(nn.Module):
    """Hidden states (..., D) to the vocabulary: activation(output_proj(hidden)) times weight (V, E), transposed.

    weight: the model's own or the very Parameter of an embedding (tied). output_proj: D to E, None if the widths agree. back:
    (D, E), the up-projection of a tied factorized embedding, used transposed instead of output_proj, after the activation.
    vocabulary: the entries of the weight's rows if it is cut over a tensor group; None for all.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        activation: Callable[[Tensor], Tensor] = identity,
        output_proj: Linear | None = None,
        back: nn.Parameter | None = None,
        vocabulary: VocabularySlice | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.vocabulary = vocabulary
        self.activation = activation
        self.output_proj = output_proj
        self.back = back

    def forward(self, hidden: Tensor, reduce: Callable[..., _R]) -> _R:
        """`reduce(features, weight, vocabulary=...)`, called here: under ZeRO-3 the weights are gathered in this forward only."""
        return reduce(*self.operands(hidden), vocabulary=self.vocabulary)

    def shards(self) -> dict[str, ParameterShard]:
        """Of the weight."""
        return vocabulary_shards(self.vocabulary, "weight")

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, E) and weight (V, E), whose product is the logits. For a caller who holds the weights gathered."""
        features = self.activation(hidden if self.output_proj is None else self.output_proj(hidden))
        if self.back is not None:
            features = linear(features, self.back, transposed=True)
        return features, self.weight


def logits(features: Tensor, weight: Tensor, *, vocabulary: VocabularySlice | None) -> Tensor:
    """Of all entries, on every rank: for generation; losses never gather them. (..., E), (rows, E) -> (..., V)"""
    own = F.linear(features, weight)
    return own if vocabulary is None else vocabulary.gather_ranks(own)
