"""Which keys a query sees in a forward pass, and how positions act on queries, keys and scores.

A stack's `AttentionBias` is made by the factory (causal or bidirectional, rotary positions, ALiBi, or neither) and builds one
`AttentionContext` per forward, for all layers. Padding and causality of rows are additive biases that compose by their minimum; a
causal stack needs no padding bias, for padding comes after all real tokens. Packed sequences need neither: see
`ops/packed_attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dstrain.batch import Sequences
from dstrain.nn.dropout import AttentionDropout
from dstrain.nn.position import Positions, numbered
from dstrain.nn.rotary import LengthRotary, RotaryPart, Rotation
from dstrain.ops.attention import attention, mean_probabilities, packed_attention, packed_mean_probabilities
from dstrain.ops.bias import Alibi, padding_bias, row_bias
from dstrain.ops.packed_attention import PackedPair
from dstrain.parallel.group import Group


@dataclass(frozen=True)
class AttentionContext:
    """How the layers of a stack attend in one forward.

    causal: query t sees keys 0..t, of whole sequences without a bias. bias: added to the scores, broadcasts to (B, H, T, S).
    packed: instead of both, if the sequences are packed. rotation: of queries and keys; None for none. sequence: the ranks that
    share the tokens, and in attention the heads; None for none.
    """

    causal: bool = False
    bias: Tensor | None = None
    packed: PackedPair | None = None
    rotation: Rotation | None = None
    sequence: Group | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: AttentionDropout) -> Tensor:
        """(B, H, T, K), twice (B, H or fewer, S, K) -> (B, H, T, K); without B if packed."""
        if self.packed is not None:
            return packed_attention(query, key, value, self.packed, dropout=dropout.p, mask_keys=dropout.mask_keys)
        return attention(query, key, value, bias=self.bias, causal=self.causal, dropout=dropout.p, mask_keys=dropout.mask_keys)

    def mean_probabilities(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, T, S) float32, (T, S) if packed: what `attend` mixes by, averaged over the heads."""
        if self.packed is not None:
            return packed_mean_probabilities(query, key, self.packed)
        return mean_probabilities(query, key, bias=self.bias, causal=self.causal)


class AttentionBias:
    """causal: whether a token sees only the tokens before it. rotary, alibi: None for none. sequence: the ranks that may share
    the tokens of a batch.
    """

    def __init__(
        self,
        *,
        causal: bool,
        rotary: RotaryPart | None = None,
        alibi: Alibi | None = None,
        sequence: Group | None = None,
    ) -> None:
        self.causal = causal
        self.rotary = rotary
        self.alibi = alibi
        self.sequence = sequence

    def for_sequences(self, sequences: Sequences, like: Tensor) -> AttentionContext:
        """Of whole sequences to themselves; on the device and in the dtype of `like`."""
        packing, lengths = sequences.packing, sequences.lengths
        if packing is None:
            rotation = self._rotation(0, sequences.end_position, lambda: lengths[:, None], like)
            bias = row_bias(lengths, sequences.end_position, like, causal=self.causal, alibi=self.alibi)
            return AttentionContext(bias.causal, bias.bias, rotation=rotation)
        group, alibi = self._shared_by(sequences), self.alibi
        if group is not None and alibi is not None:
            alibi = alibi.of_heads(group.rank, group.size)
        pair = PackedPair(packing, packing, lengths, like, causal=self.causal, alibi=alibi)
        rotation = self._rotation(packing.positions, packing.longest, lambda: packing.token_lengths, like)
        return AttentionContext(packed=pair, rotation=rotation, sequence=group)

    def for_memory(self, source: Sequences, target: Sequences, like: Tensor) -> AttentionContext:
        """Of a decoder to the encoder's output: each token sees the source of its sequence.

        like: gives device and dtype. ValueError if only one side is packed.
        """
        if source.packing is None and target.packing is None:
            return AttentionContext(bias=padding_bias(source.lengths, source.end_position, like.dtype))
        if source.packing is None or target.packing is None:
            raise ValueError("source and target must both be packed, or neither")
        pair = PackedPair(target.packing, source.packing, source.lengths, like)
        return AttentionContext(packed=pair, sequence=self._shared_by(target))

    def for_decoding(
        self, query: Positions, keys: Positions, end_position: int, mask: Tensor | None, like: Tensor
    ) -> AttentionContext:
        """Of new tokens to all so far. query, keys: their positions, all below `end_position`, up to which an offset goes.

        mask: additive, hides keys from new tokens; None if they see all.
        """

        def lengths() -> Tensor:
            return torch.tensor([[end_position]], device=like.device) if isinstance(query, int) else query[:, -1:] + 1

        rotation = self._rotation(query, end_position, lengths, like)
        if self.alibi is None:
            return AttentionContext(bias=mask, rotation=rotation)
        query, keys = (numbered(each, end_position, like.device) for each in (query, keys))
        bias = self.alibi.bias(query, keys, like.dtype)
        return AttentionContext(bias=bias if mask is None else bias + mask, rotation=rotation)

    def invalidates_cache(self, length: int) -> bool:
        """Whether a sequence of `length` tokens changes the results of its earlier tokens."""
        return self.rotary is not None and self.rotary.invalidates_cache(length)

    @property
    def may_invalidate_cache(self) -> bool:
        """Whether there are such lengths."""
        return isinstance(self.rotary, LengthRotary)

    def _shared_by(self, sequences: Sequences) -> Group | None:
        if not sequences.is_share:
            return None
        if self.sequence is None:
            raise ValueError("the tokens are a share, but the model has no sequence group; give it to build_model")
        return self.sequence

    def _rotation(self, positions: Positions, end_position: int, lengths: Callable[[], Tensor], like: Tensor) -> Rotation | None:
        return None if self.rotary is None else self.rotary.rotation(positions, end_position, lengths, like)
