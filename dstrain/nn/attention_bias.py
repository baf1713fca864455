"""Which keys a query sees in a forward pass, and how positions act on queries, keys and scores.

A stack's `AttentionBias` is made by the factory (causal or bidirectional, rotary positions, ALiBi, or neither) and builds one
`AttentionContext` per forward, for all layers. Padding, causality and segments are additive biases that compose by their minimum.
In a packed row attention stays within a segment; in a padded row a causal stack needs no padding bias, for padding comes after
all real tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dstrain.batch import Sequences
from dstrain.nn.position import Positions, numbered
from dstrain.nn.rotary import LengthRotary, RotaryPart, Rotation
from dstrain.ops.bias import alibi_bias, causal_bias, padding_bias, segment_bias, segment_lengths


@dataclass(frozen=True)
class AttentionContext:
    """causal: query t sees keys 0..t, of whole sequences without a bias. bias: added to the scores, broadcasts to (B, H, T, S).

    rotation: of queries and keys; None for none.
    """

    causal: bool = False
    bias: Tensor | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Alibi:
    """head_slopes: of each head. lead: by how much a later key counts as nearer."""

    head_slopes: tuple[float, ...]
    lead: float = 0.0

    def bias(self, query: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """(T,), (S,) -> (H, T, S) or (B, T), (B, S) -> (B, H, T, S)"""
        head_slopes = torch.tensor(self.head_slopes, device=query.device)
        return alibi_bias(head_slopes, query, keys, lead=self.lead).to(dtype)


class _Span(NamedTuple):
    """Positions of queries and keys; an offset goes up to `end_position`."""

    query: Positions
    keys: Positions
    end_position: int


class AttentionBias:
    """causal: whether a token sees only the tokens before it. rotary, alibi: None for none."""

    def __init__(self, *, causal: bool, rotary: RotaryPart | None = None, alibi: Alibi | None = None) -> None:
        self.causal = causal
        self.rotary = rotary
        self.alibi = alibi

    def for_sequences(self, sequences: Sequences, like: Tensor) -> AttentionContext:
        """Of whole sequences, padded or packed; on the device and in the dtype of `like`."""
        width, segments = sequences.tokens.shape[1], sequences.segments
        positions = 0 if sequences.positions is None else sequences.positions
        mask, lengths = None, lambda: sequences.lengths[:, None]
        if segments is not None:
            mask, lengths = segment_bias(segments, segments, like.dtype), lambda: segment_lengths(segments)
        elif not self.causal:
            mask = padding_bias(sequences.lengths, width, like.dtype)
        plain = self.causal and mask is None and self.alibi is None
        if self.causal and not plain:
            before = causal_bias(width, width, like.dtype, like.device)
            mask = before if mask is None else torch.minimum(mask, before)
        context = self._context(_Span(positions, positions, width), mask, lengths, like)
        return replace(context, causal=plain)

    def for_decoding(
        self, query: Positions, keys: Positions, end_position: int, mask: Tensor | None, like: Tensor
    ) -> AttentionContext:
        """Of new tokens to all so far. query, keys: their positions, all below `end_position`, up to which an offset goes.

        mask: additive, hides keys from new tokens; None if they see all.
        """

        def lengths() -> Tensor:
            return torch.tensor([[end_position]], device=like.device) if isinstance(query, int) else query[:, -1:] + 1

        return self._context(_Span(query, keys, end_position), mask, lengths, like)

    def invalidates_cache(self, length: int) -> bool:
        """Whether a sequence of `length` tokens changes the results of its earlier tokens."""
        return self.rotary is not None and self.rotary.invalidates_cache(length)

    @property
    def may_invalidate_cache(self) -> bool:
        """Whether there are such lengths."""
        return isinstance(self.rotary, LengthRotary)

    def _context(self, span: _Span, mask: Tensor | None, lengths: Callable[[], Tensor], like: Tensor) -> AttentionContext:
        rotation = None if self.rotary is None else self.rotary.rotation(span.query, span.end_position, lengths, like)
        if self.alibi is None:
            return AttentionContext(bias=mask, rotation=rotation)
        query, keys = (numbered(positions, span.end_position, like.device) for positions in (span.query, span.keys))
        bias = self.alibi.bias(query, keys, like.dtype)
        return AttentionContext(bias=bias if mask is None else bias + mask, rotation=rotation)


def cross_attention_bias(source: Sequences, target: Sequences, dtype: torch.dtype) -> Tensor | None:
    """Hide from each decoder position the padding of its row, in packed rows all other segments. -> (B, 1, 1 or T, S)

    None if nothing needs hiding. ValueError if only one side is packed.
    """
    if source.segments is None and target.segments is None:
        return padding_bias(source.lengths, source.tokens.shape[1], dtype)
    if source.segments is None or target.segments is None:
        raise ValueError("source and target must both be packed, or neither")
    return segment_bias(target.segments, source.segments, dtype)
