"""Attention of packed sequences, (H, N, K): each token sees the keys of its own sequence. Three kernels, chosen in `kernels.py`.

padded_rows    gathers the sequences into padded rows, where attention is as everywhere; runs on any device, with dropout
varlen         torch's flash attention for packed sequences: no padding, no mask; on a GPU in 16 bits
flex           torch's FlexAttention with a mask of sequences and ALiBi's scores; on a GPU, compiled once for up to 128 tokens and
               once for any larger number

No GPU has run `varlen` and `flex` yet: the tests compare `flex` in its slow form for CPUs, and what `varlen` is called with.
Padding after the last sequence gets zeros from `padded_rows`; for `varlen` it is one more sequence, or its outputs would be
whatever was in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dstrain.batch import Packing, RowIndex
from dstrain.ops.bias import Alibi, RowBias, padding_bias, row_bias

RowAttention = Callable[..., Tensor]
"""`attention.attention`, without dropout given yet."""


@dataclass(frozen=True)
class PackedPair:
    """Queries and keys of packed sequences; one for all layers of a forward. keys: of the same sequences, in the same order.

    key_lengths: (b,) tokens of each sequence of keys. like: gives device and dtype. causal, alibi: only if queries are the keys.
    """

    queries: Packing
    keys: Packing
    key_lengths: Tensor
    like: Tensor
    causal: bool = False
    alibi: Alibi | None = None

    @cached_property
    def row_bias(self) -> RowBias:
        """Of the same sequences as padded rows."""
        if self.queries is not self.keys:
            return RowBias(padding_bias(self.key_lengths, self.keys.longest, self.like.dtype))
        return row_bias(self.key_lengths, self.keys.longest, self.like, causal=self.causal, alibi=self.alibi)

    @cached_property
    def block_mask(self) -> Any:
        """Of FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = self.queries.segments[query] == self.keys.segments[key]
            return same & (self.keys.positions[key] <= self.queries.positions[query]) if self.causal else same

        sizes = len(self.queries.positions), len(self.keys.positions)
        return create_block_mask(sees, None, None, *sizes, device=self.like.device)


def padded_rows(query: Tensor, key: Tensor, value: Tensor, pair: PackedPair, attend: RowAttention) -> Tensor:
    """query: (H, N, K); key, value: (H or fewer, M, K) -> (H, N, K). attend: attention of padded rows."""
    queries, keys = pair.queries.rows, pair.keys.rows
    rows = (to_rows(query, queries), to_rows(key, keys), to_rows(value, keys))
    return from_rows(attend(*rows, bias=pair.row_bias.bias, causal=pair.row_bias.causal), queries, query.shape[1])


def varlen(query: Tensor, key: Tensor, value: Tensor, pair: PackedPair, attend: RowAttention) -> Tensor:
    """The same, for a pair without ALiBi."""
    from torch.nn.attention.varlen import varlen_attn  # a second of imports

    (query_starts, longest_query), (key_starts, longest_key) = map(_with_padding, (pair.queries, pair.keys))
    query, key, value = (heads.transpose(0, 1) for heads in (query, key, value))  # (N, H, K)
    mixed = varlen_attn(
        query,
        key,
        value,
        query_starts,
        key_starts,
        longest_query,
        longest_key,
        window_size=(-1, 0) if pair.causal else (-1, -1),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    assert isinstance(mixed, Tensor)
    return mixed.transpose(0, 1)


def flex(query: Tensor, key: Tensor, value: Tensor, pair: PackedPair, attend: RowAttention) -> Tensor:
    """The same, with ALiBi."""
    from torch.nn.attention.flex_attention import flex_attention

    alibi, positions = pair.alibi, pair.queries.positions
    assert alibi is not None
    head_slopes, lead = alibi.on_device(query.device), alibi.lead

    def add_alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = positions[key] - positions[query]
        return score - head_slopes[head] * (distance.abs() - lead * (distance > 0))

    compute: Any = _compiled_flex() if query.is_cuda else flex_attention  # not compiled it holds all scores
    batch = (heads.unsqueeze(0) for heads in (query, key, value))
    mixed: Tensor = compute(*batch, add_alibi, pair.block_mask, enable_gqa=len(key) != len(query))
    return mixed.squeeze(0)


@cache
def _compiled_flex(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Micro-batches differ in length: with a graph for each, the ninth would no longer be compiled, and hold all scores.
    return torch.compile(flex_attention, dynamic=True, backend=backend)


def _with_padding(side: Packing) -> tuple[Tensor, int]:
    """Where each sequence starts, and tokens of the longest; what comes after the last one is one more."""
    padding = len(side.positions) - side.num_tokens
    return F.pad(side.starts, (0, 1), value=len(side.positions)), max(side.longest, padding)


def to_rows(heads: Tensor, rows: RowIndex) -> Tensor:
    """(H, N, K) -> (b, H, L, K), any values at padding."""
    moved: Tensor = _ToRows.apply(heads.transpose(0, 1), rows)  # type: ignore[no-untyped-call]
    return moved.transpose(1, 2)


def from_rows(heads: Tensor, rows: RowIndex, num_tokens: int) -> Tensor:
    """(b, H, L, K) -> (H, N, K), zeros at padding."""
    moved: Tensor = _FromRows.apply(heads.transpose(1, 2), rows, num_tokens)  # type: ignore[no-untyped-call]
    return moved.transpose(0, 1)


class _ToRows(torch.autograd.Function):
    """Gathers in both directions: what is at padding gets no gradient, as nothing sees it."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: RowIndex) -> Tensor:
        ctx.rows, ctx.num_tokens = rows, len(tokens)
        return tokens.index_select(0, rows.tokens).view(-1, ctx.rows.width, *tokens.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad.flatten(0, 1), ctx.rows.cells, ctx.num_tokens), None


class _FromRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cells: Tensor, rows: RowIndex, num_tokens: int) -> Tensor:
        ctx.rows = rows
        return _gather(cells.flatten(0, 1), rows.cells, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        of_cells = grad.index_select(0, ctx.rows.tokens).index_fill_(0, ctx.rows.padding, 0)
        return of_cells.view(-1, ctx.rows.width, *grad.shape[1:]), None, None


def _gather(cells: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Those of the real tokens, then zeros. (b * L, H, K), (m,) -> (N, H, K)"""
    gathered = cells.new_empty(num_tokens, *cells.shape[1:])
    torch.index_select(cells, 0, index, out=gathered[: len(index)])
    gathered[len(index) :].zero_()
    return gathered
