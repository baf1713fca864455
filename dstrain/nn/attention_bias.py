"""What all self-attentions of a stack share in one forward: who sees whom, and what positions do to queries, keys and scores.

Built once per forward by the stack's `AttentionBias`, whose parts the factory chooses: causal or bidirectional, rotary positions,
ALiBi, or neither.
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
    """causal: query t sees keys 0..t, for whole sequences without a bias. bias: added to the scores, broadcasts to (B, H, T, S).

    rotation: None leaves queries and keys alone.
    """

    causal: bool = False
    bias: Tensor | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Alibi:
    """slopes: of each head. lead: by how much a later key counts as nearer."""

    slopes: tuple[float, ...]
    lead: float = 0.0

    def bias(self, query: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """(T,), (S,) -> (H, T, S) or (B, T), (B, S) -> (B, H, T, S)"""
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=query.device)
        return alibi_bias(slopes, query, keys, lead=self.lead).to(dtype)


class _Places(NamedTuple):
    query: Positions
    keys: Positions
    end_position: int


class AttentionBias:
    """causal: whether a token sees only what comes before it. rotary, alibi: None for none."""

    def __init__(self, *, causal: bool, rotary: RotaryPart | None = None, alibi: Alibi | None = None) -> None:
        self.causal = causal
        self.rotary = rotary
        self.alibi = alibi

    def whole(self, sequences: Sequences, like: Tensor) -> AttentionContext:
        """Of whole right-padded sequences; on the device and in the dtype of `like`.

        A causal stack needs no padding bias: padding comes after all real tokens, so none of them sees it.
        """
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
        context = self._context(_Places(positions, positions, width), mask, lengths, like)
        return replace(context, causal=plain)

    def step(self, query: Positions, keys: Positions, end_position: int, mask: Tensor | None, like: Tensor) -> AttentionContext:
        """Of new tokens to all so far. query, keys: their positions, all below `reach`, up to which an offset goes.

        mask: what new tokens do not see of the keys, None if they see all.
        """

        def lengths() -> Tensor:
            return torch.tensor([[end_position]], device=like.device) if isinstance(query, int) else query[:, -1:] + 1

        return self._context(_Places(query, keys, end_position), mask, lengths, like)

    def moves(self, length: int) -> bool:
        """Whether in a sequence of `length` tokens nothing computed for the tokens before holds any more."""
        return self.rotary is not None and self.rotary.moves(length)

    @property
    def may_invalidate_cache(self) -> bool:
        """Whether there are such lengths."""
        return isinstance(self.rotary, LengthRotary)

    def _context(self, taps: _Places, mask: Tensor | None, lengths: Callable[[], Tensor], like: Tensor) -> AttentionContext:
        rotation = None if self.rotary is None else self.rotary.rotation(taps.query, taps.end_position, lengths, like)
        if self.alibi is None:
            return AttentionContext(bias=mask, rotation=rotation)
        query, keys = (numbered(part, taps.end_position, like.device) for part in (taps.query, taps.keys))
        bias = self.alibi.bias(query, keys, like.dtype)
        return AttentionContext(bias=bias if mask is None else bias + mask, rotation=rotation)
