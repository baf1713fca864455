"""Encoder and decoder layers: sublayers with a residual connection and a norm before (pre) or after (post)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from dstrain.nn.attention import CrossAttention, SelfAttention
from dstrain.nn.attention_bias import AttentionContext
from dstrain.nn.cache import LayerCache
from dstrain.nn.capture import NO_HOOKS, LayerHooks
from dstrain.nn.dropout import Dropout
from dstrain.nn.norm import norm_of_sum

NormOrder = Literal["pre", "post"]


class ResidualLayer(nn.Module):
    """What both kinds of layer do around each sublayer."""

    def __init__(self, *, norm_order: NormOrder, dropout: Dropout) -> None:
        super().__init__()
        self.norm_order = norm_order
        self.dropout = dropout

    def residual(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """pre: x + dropout(sublayer(norm(x))); post: norm(x + dropout(sublayer(x)))"""
        if self.norm_order == "pre":
            return self.dropout.add(x, sublayer(norm(x)))
        return norm_of_sum(norm, x, sublayer(x), self.dropout)


class EncoderLayer(ResidualLayer):
    """Self-attention, feed-forward: a layer of an encoder, or of a decoder that has none beside it."""

    def __init__(
        self,
        *,
        self_attention: SelfAttention,
        self_attention_norm: nn.Module,
        feed_forward: nn.Module,
        feed_forward_norm: nn.Module,
        norm_order: NormOrder,
        dropout: Dropout,
    ) -> None:
        super().__init__(norm_order=norm_order, dropout=dropout)
        self.self_attention = self_attention
        self.self_attention_norm = self_attention_norm
        self.feed_forward = feed_forward
        self.feed_forward_norm = feed_forward_norm

    def forward(
        self, x: Tensor, *, context: AttentionContext, cache: LayerCache | None = None, hooks: LayerHooks = NO_HOOKS
    ) -> Tensor:
        """(B, S, D) -> (B, S, D), (N, D) -> (N, D)"""

        def attend(x: Tensor) -> Tensor:
            attended: Tensor = self.self_attention(x, context=context, cache=cache, hooks=hooks.own)
            return attended

        x = self.residual(x, self.self_attention_norm, attend)
        return self.residual(x, self.feed_forward_norm, self.feed_forward)


class DecoderLayer(ResidualLayer):
    """Causal self-attention, cross-attention, feed-forward."""

    def __init__(
        self,
        *,
        self_attention: SelfAttention,
        self_attention_norm: nn.Module,
        cross_attention: CrossAttention,
        cross_attention_norm: nn.Module,
        feed_forward: nn.Module,
        feed_forward_norm: nn.Module,
        norm_order: NormOrder,
        dropout: Dropout,
    ) -> None:
        super().__init__(norm_order=norm_order, dropout=dropout)
        self.self_attention = self_attention
        self.self_attention_norm = self_attention_norm
        self.cross_attention = cross_attention
        self.cross_attention_norm = cross_attention_norm
        self.feed_forward = feed_forward
        self.feed_forward_norm = feed_forward_norm

    def forward(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        context: AttentionContext,
        memory_context: AttentionContext,
        cache: LayerCache | None = None,
        hooks: LayerHooks = NO_HOOKS,
    ) -> Tensor:
        """(..., D) -> (..., D). key, value: what `cross_attention.project_memory` made, seen as `memory_context` says."""

        def attend(x: Tensor) -> Tensor:
            attended: Tensor = self.self_attention(x, context=context, cache=cache, hooks=hooks.own)
            return attended

        def attend_to_source(x: Tensor) -> Tensor:
            attended: Tensor = self.cross_attention(x, key, value, context=memory_context, hooks=hooks.cross)
            return attended

        x = self.residual(x, self.self_attention_norm, attend)
        x = self.residual(x, self.cross_attention_norm, attend_to_source)
        return self.residual(x, self.feed_forward_norm, self.feed_forward)
