"""Encoder and decoder layers: sublayers with a residual connection and a norm before (pre) or after (post)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from dstrain.nn.attention import CrossAttention, Heads, SelfAttention
from dstrain.nn.attention_bias import AttentionContext
from dstrain.nn.cache import LayerCache
from dstrain.nn.capture import NO_HOOKS, LayerHooks
from dstrain.nn.dropout import Dropout
from dstrain.nn.norm import norm_of_sum

NormOrder = Literal["pre", "post"]


class ResidualLayer(nn.Module):
    """What both kinds of layer do around each sublayer. pre: x + dropout(sublayer(norm(x))); post: norm(x + dropout(sublayer(x)))

    A layer is written as what comes before, between and after its attentions: what a compiler fuses, token by token, whatever
    the sequences are (`nn/compiling.py`).
    """

    def __init__(self, *, norm_order: NormOrder, dropout: Dropout) -> None:
        super().__init__()
        self.norm_order = norm_order
        self.dropout = dropout

    def enter(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What the first sublayer reads."""
        result: Tensor = norm(x) if self.norm_order == "pre" else x
        return result

    def go_on(self, x: Tensor, passed: Tensor, norm: nn.Module, next_norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The layer's x after a sublayer that gave `passed`, and what the next one reads, in one pass over memory."""
        if self.norm_order == "pre":
            return norm_of_sum(next_norm, x, passed, self.dropout)
        x = norm_of_sum(norm, x, passed, self.dropout).normed
        return x, x

    def leave(self, x: Tensor, passed: Tensor, norm: nn.Module) -> Tensor:
        """The layer's x after its last sublayer, which gave `passed`."""
        return self.dropout.add(x, passed) if self.norm_order == "pre" else norm_of_sum(norm, x, passed, self.dropout).normed


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
        heads = self.before_attention(x, context)
        return self.after_attention(x, self.self_attention.attend(heads, context=context, cache=cache, hooks=hooks.own))

    def before_attention(self, x: Tensor, context: AttentionContext) -> Heads:
        """Queries, keys and values."""
        return self.self_attention.project(self.enter(x, self.self_attention_norm), context)

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the layer."""
        x, read = self.go_on(x, self.self_attention.output(mixed), self.self_attention_norm, self.feed_forward_norm)
        return self.leave(x, self.feed_forward(read), self.feed_forward_norm)


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
        heads = self.before_attention(x, context)
        mixed = self.self_attention.attend(heads, context=context, cache=cache, hooks=hooks.own)
        x, heads = self.between_attentions(x, mixed, key, value, memory_context)
        return self.after_attention(x, self.cross_attention.attend(heads, context=memory_context, hooks=hooks.cross))

    def before_attention(self, x: Tensor, context: AttentionContext) -> Heads:
        """Queries, keys and values."""
        return self.self_attention.project(self.enter(x, self.self_attention_norm), context)

    def between_attentions(
        self, x: Tensor, mixed: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Heads]:
        """x after self-attention; queries, keys and values of the one to the source."""
        x, read = self.go_on(x, self.self_attention.output(mixed), self.self_attention_norm, self.cross_attention_norm)
        return x, self.cross_attention.project(read, key, value, context)

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the layer."""
        x, read = self.go_on(x, self.cross_attention.output(mixed, x), self.cross_attention_norm, self.feed_forward_norm)
        return self.leave(x, self.feed_forward(read), self.feed_forward_norm)
