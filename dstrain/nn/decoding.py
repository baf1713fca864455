"""A decoder's step of one token a row, as plain functions.

So little is computed in such a step that calling the modules takes a CPU as long as the products do. A generation therefore
prepares the decoder once, from the weights of that moment: each part becomes the functions that it calls. What is not known here
(an adapter, a map cut by its inputs, a new norm) stays a module and is called as one. Modules remain the definition: tests hold
the steps of every variant to them.

Keys are read in whole blocks of `KEY_BLOCK` positions, see `ops/cpu/attention.py`: a bias hides those that do not exist yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.nn.attention import CrossAttention, SelfAttention
from dstrain.nn.attention_bias import AttentionContext
from dstrain.nn.cache import KeyValueCache
from dstrain.nn.embedding import InputEmbedding, Projection, TokenEmbedding, logits
from dstrain.nn.feed_forward import FeedForward, GatedFeedForward, TensorMap
from dstrain.nn.layers import DecoderLayer, EncoderLayer
from dstrain.nn.linear import BlockLinear, FusedLinear, Linear
from dstrain.nn.position import Positions
from dstrain.nn.rotary import Rotation
from dstrain.nn.stack import LayerStack
from dstrain.ops.activation import identity
from dstrain.ops.cpu.attention import KEY_BLOCK
from dstrain.ops.kernels import DECODING_ATTENTION, FIXED_LINEAR, DecodingAttention

SourceKeys = tuple[Tensor, Tensor]
"""Keys and values of the source at one depth, (B, H or fewer, S, K) each."""


class _Step(NamedTuple):
    """What the layers of a step share. source: by depth. bias, source_bias: added to the scores, (P or 1, Q or 1, S), where P
    counts key heads of rows or of sentences, Q the queries that each has.
    """

    attend: DecodingAttention
    cache: KeyValueCache
    rotation: Rotation | None
    bias: Tensor
    source: Sequence[SourceKeys]
    source_bias: Tensor


_Sublayer = Callable[[Tensor, _Step, int], Tensor]
"""(N, D) at a depth -> (N, D)"""


class DecodingPlan:
    """A decoder from its input to its vocabulary projection, prepared.

    Copied matrices stay as they were, everything else is read as it is: weights must not change while a plan is in use.
    """

    def __init__(
        self, embedding: InputEmbedding, decoder: LayerStack[DecoderLayer] | LayerStack[EncoderLayer], projection: Projection
    ) -> None:
        self.embed = _embedding(embedding)
        self._layers = decoder.passes(_sublayers)
        self._final_norm = _prepared(decoder.final_norm)
        self._project = _projection(projection)

    def step(
        self,
        x: Tensor,
        cache: KeyValueCache,
        context: AttentionContext,
        source: Sequence[SourceKeys] = (),
        source_bias: Tensor | None = None,
    ) -> Tensor:
        """Logits after one new token, the cache not advanced. x: (N, 1, D); context: of that token -> (N, 1, V)

        source: by depth, padded to whole blocks; source_bias: (B, 1, 1, S), None if all of it is seen.
        """
        hidden = x[:, 0]
        attend = DECODING_ATTENTION.choose(x.device, x.dtype)
        step = _Step(
            attend, cache, context.rotation, cache.block_bias(context.bias), source, _of_key_heads(source, source_bias, x)
        )
        for depth, sublayers in enumerate(self._layers):
            for sublayer in sublayers:
                hidden = sublayer(hidden, step, depth)
        return self._project(self._final_norm(hidden)).unsqueeze(1)


def _of_key_heads(source: Sequence[SourceKeys], bias: Tensor | None, like: Tensor) -> Tensor:
    """(B, 1, 1, S) -> (B * heads of keys, 1, S); something that adds nothing for None."""
    if bias is None:
        return like.new_zeros(1, 1, 1)
    return bias.expand(-1, source[0][0].shape[1], -1, -1).flatten(0, 1)


def whole_blocks(source: Sequence[SourceKeys]) -> list[SourceKeys]:
    """The keys of each depth in whole blocks, with zeros behind them; those that depths share stay shared."""
    padded = {id(keys): _in_blocks(*keys) for keys in source}
    return [padded[id(keys)] for keys in source]


def _in_blocks(key: Tensor, value: Tensor) -> SourceKeys:
    missing = (0, 0, 0, -key.shape[2] % KEY_BLOCK)
    return F.pad(key, missing).contiguous(), F.pad(value, missing).contiguous()


def _embedding(module: InputEmbedding) -> Callable[[Tensor, Positions, int], Tensor]:
    """The input stage without dropout, called as the module is. (N, 1) -> (N, 1, D)"""
    positions, norm, scale = module.positions, _prepared(module.norm), module.scale
    tokens: TensorMap = module.tokens
    if isinstance(module.tokens, TokenEmbedding) and module.tokens.vocabulary is None:
        tokens = partial(torch.embedding, module.tokens.weight)

    def embed(ids: Tensor, where: Positions, end_position: int) -> Tensor:
        x = tokens(ids)
        return norm(torch.add(positions(where, end_position, x), x, alpha=scale))

    return embed


def _sublayers(layer: DecoderLayer | EncoderLayer) -> list[_Sublayer]:
    parts = [_with_residual(layer, layer.self_attention_norm, _self_attention(layer.self_attention))]
    if isinstance(layer, DecoderLayer):
        parts.append(_with_residual(layer, layer.cross_attention_norm, _cross_attention(layer.cross_attention)))
    feed_forward = _prepared(layer.feed_forward)
    return [*parts, _with_residual(layer, layer.feed_forward_norm, lambda x, step, depth: feed_forward(x))]


def _with_residual(layer: DecoderLayer | EncoderLayer, norm_module: nn.Module, sublayer: _Sublayer) -> _Sublayer:
    norm = _prepared(norm_module)

    def pre(x: Tensor, step: _Step, depth: int) -> Tensor:
        return x + sublayer(norm(x), step, depth)

    def post(x: Tensor, step: _Step, depth: int) -> Tensor:
        return norm(x + sublayer(x, step, depth))

    return pre if layer.norm_order == "pre" else post


def _self_attention(module: SelfAttention) -> _Sublayer:
    qkv, out_proj, head_dim = _blocks(module.qkv), _prepared(module.out_proj), module.head_dim

    def attend(x: Tensor, step: _Step, depth: int) -> Tensor:
        rows = x.shape[0]
        query, key, value = [part.view(rows, -1, head_dim) for part in qkv(x)]  # (N, H or fewer, K)
        if step.rotation is not None:
            query, key = (step.rotation(part.unsqueeze(2)).squeeze(2) for part in (query, key))
        keys, values = step.cache.put(depth, key, value)
        mixed = step.attend(query.reshape(keys.shape[0], -1, head_dim), keys, values, step.bias)
        return out_proj(mixed.view(rows, -1))

    return attend


def _cross_attention(module: CrossAttention) -> _Sublayer:
    q_proj, out_proj, head_dim = _prepared(module.q_proj), _prepared(module.out_proj), module.head_dim

    def attend(x: Tensor, step: _Step, depth: int) -> Tensor:
        keys, values = step.source[depth]
        sentences, key_heads, width, _ = keys.shape
        together = sentences * key_heads
        query = q_proj(x)  # (N, H * K)
        queries = query.shape[1] // key_heads
        query = query.view(sentences, -1, key_heads, queries).transpose(1, 2).reshape(together, -1, head_dim)
        keys, values = keys.view(together, width, head_dim), values.view(together, width, head_dim)
        mixed = step.attend(query, keys, values, step.source_bias).view(sentences, key_heads, -1, queries)
        return out_proj(mixed.transpose(1, 2).reshape(x.shape[0], -1))

    return attend


def _prepared(module: nn.Module) -> TensorMap:
    """The function that the module is without gradient, (N, ...) -> (N, ...); the module itself if it is not known here."""
    match module:
        case Linear(inputs=None):
            return _fixed_linear(module.weight, module.bias)
        case nn.Identity():
            return identity
        case nn.LayerNorm():
            shape, weight, bias, eps = list(module.normalized_shape), module.weight, module.bias, module.eps
            return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
        case FeedForward():
            up_proj, down_proj, activation = _prepared(module.up_proj), _prepared(module.down_proj), module.activation
            return lambda x: down_proj(activation(up_proj(x)))
        case GatedFeedForward():
            return _gated(module)
        case _:
            return module


def _gated(module: GatedFeedForward) -> TensorMap:
    up_gate, down_proj, activation = _blocks(module.up_gate), _prepared(module.down_proj), module.activation

    def run(x: Tensor) -> Tensor:
        up, gate = up_gate(x)
        return down_proj(activation(gate) * up)

    return run


def _blocks(module: BlockLinear) -> Callable[[Tensor], Sequence[Tensor]]:
    """(N, I) -> (N, O) for each block."""
    if not isinstance(module, FusedLinear):
        return module
    product, sizes = _fixed_linear(module.weight, module.bias), module.sizes
    return lambda x: torch.split_with_sizes(product(x), sizes, -1)


def _projection(module: Projection) -> TensorMap:
    """(N, D) -> logits (N, V)"""
    if type(module) is not Projection or module.vocabulary is not None:
        return lambda hidden: module(hidden, logits)
    product = _fixed_linear(module.weight, None)
    return lambda hidden: product(module.operands(hidden)[0])


def _fixed_linear(weight: Tensor, bias: Tensor | None) -> TensorMap:
    """The map of this weight as it is now. (N, I) -> (N, O)"""
    prepare = FIXED_LINEAR.choose(weight.device, weight.dtype, size=weight.numel())
    return prepare(weight, bias)
