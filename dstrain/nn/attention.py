"""Self- and cross-attention with any number of key-value heads: the shapes of the projections decide.

Heads are strided views of the projections' outputs; nothing is transposed in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dstrain.nn.attention_bias import AttentionContext
from dstrain.nn.cache import LayerCache
from dstrain.nn.dropout import attention_dropout
from dstrain.nn.linear import BlockLinear
from dstrain.parallel.collectives import reduce_from
from dstrain.parallel.group import Group
from dstrain.parallel.sequence import heads_to_tokens, tokens_to_heads

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries (B, H, T, K), keys and values (B, H or fewer, S, K); packed sequences have no B."""
AttentionHook = Callable[[Tensor], None]
"""Takes the attention probabilities averaged over the heads, (B, T, S) or (T, S); they are computed only for it."""


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * K) -> (B, H, T, K), a view; packed sequences have no B."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, K) -> (B, T, H * K)"""
    return x.transpose(-3, -2).flatten(-2)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself. qkv: blocks q_proj, k_proj, v_proj; heads: the tensor group that shares the heads."""

    def __init__(
        self, *, qkv: BlockLinear, out_proj: nn.Module, head_dim: int, dropout: float, heads: Group | None = None
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.out_proj = out_proj
        self.head_dim = head_dim
        self.dropout = dropout
        self.heads = heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values on this rank."""
        return self.qkv.blocks["k_proj"] // self.head_dim

    def forward(
        self, x: Tensor, *, context: AttentionContext, cache: LayerCache | None = None, hooks: AttentionHook | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), (N, D) -> (N, D). With a cache, keys and values of earlier positions take part."""
        return self.output(self.attend(self.project(x, context), context=context, cache=cache, hooks=hooks))

    def project(self, x: Tensor, context: AttentionContext) -> Heads:
        """Queries, keys and values of this rank's heads, rotated."""
        query, key, value = (split_heads(part, self.head_dim) for part in self.qkv(x))
        query, key, value = tokens_to_heads((query, key, value), context.sequence)
        if context.rotation is not None:
            query, key = context.rotation(query), context.rotation(key)
        return query, key, value

    def attend(
        self, heads: Heads, *, context: AttentionContext, cache: LayerCache | None = None, hooks: AttentionHook | None = None
    ) -> Tensor:
        """What `output` takes, of what `project` gave."""
        query, key, value = heads
        if cache is not None:
            key, value = cache.append(key, value)
        return _attend(self, context, (query, key, value), hooks)

    def output(self, mixed: Tensor) -> Tensor:
        """(B, H, T, K) -> (B, T, D)"""
        result: Tensor = self.out_proj(merge_heads(mixed))
        return result


class CrossAttention(nn.Module):
    """Attention of the decoder to the encoder's output. kv: blocks k_proj, v_proj; heads: as above."""

    def __init__(
        self,
        *,
        q_proj: nn.Module,
        kv: BlockLinear,
        out_proj: nn.Module,
        head_dim: int,
        dropout: float,
        heads: Group | None = None,
    ) -> None:
        super().__init__()
        self.q_proj = q_proj
        self.kv = kv
        self.out_proj = out_proj
        self.head_dim = head_dim
        self.dropout = dropout
        self.heads = heads

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the source. (B, S, D) -> twice (B, H or fewer, S, K); packed sequences have no B."""
        key, value = (split_heads(part, self.head_dim) for part in self.kv(memory))
        return key, value

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, *, context: AttentionContext, hooks: AttentionHook | None = None
    ) -> Tensor:
        """x: (M, T, D) or (N, D); key, value: (B, H or fewer, S, K), packed without B -> as x.

        M is a multiple of B: all rows of a source (beams) are adjacent as queries, the source is never copied.
        """
        return self.output(self.attend(self.project(x, key, value, context), context=context, hooks=hooks), x)

    def project(self, x: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Heads:
        """Queries, and keys and values of this rank's heads."""
        query = self.q_proj(x)
        query = split_heads(query.reshape(*key.shape[:-3], -1, query.shape[-1]), self.head_dim)  # (B, H, M / B * T, K)
        query, key, value = tokens_to_heads((query, key, value), context.sequence)
        return query, key, value

    def attend(self, heads: Heads, *, context: AttentionContext, hooks: AttentionHook | None = None) -> Tensor:
        """What `output` takes, of what `project` gave."""
        return _attend(self, context, heads, hooks)

    def output(self, mixed: Tensor, x: Tensor) -> Tensor:
        """(B, H, M / B * T, K) -> (M, T, D), the shape of x"""
        result: Tensor = self.out_proj(merge_heads(mixed)).view_as(x)
        return result


def _attend(
    module: SelfAttention | CrossAttention,
    context: AttentionContext,
    parts: Heads,
    hooks: AttentionHook | None,
) -> Tensor:
    """Queries, keys and values of this rank's heads -> what its tokens get, of all heads but those of other tensor ranks."""
    query, key, value = parts
    if hooks is not None:
        hooks(_over_ranks(context.mean_probabilities(query, key), module.heads, context.sequence))
    p, num_heads = module.dropout if module.training else 0.0, query.shape[-3]
    dropout = attention_dropout(p, num_heads, heads=module.heads, sequence=context.sequence)
    return heads_to_tokens(context.attend(query, key, value, dropout), context.sequence)


def _over_ranks(mean: Tensor, heads: Group | None, sequence: Group | None) -> Tensor:
    """The mean over the heads of all ranks from that over this rank's: of this rank's tokens."""
    if sequence is not None:
        mean = heads_to_tokens(mean.unsqueeze(0), sequence).mean(0)
    return mean if heads is None else reduce_from(mean / heads.size, heads)
