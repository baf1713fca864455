"""Modules as the parts that kernels of generation take (`ops/layer_parts.py`): their weights, or themselves as functions.

What is not known here (an adapter, a map cut by its inputs, a new norm) stays a module and is called as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dstrain.nn.attention import CrossAttention, SelfAttention
from dstrain.nn.feed_forward import FeedForward, GatedFeedForward
from dstrain.nn.layers import DecoderLayer, EncoderLayer
from dstrain.nn.linear import BlockLinear, FusedLinear, Linear
from dstrain.nn.norm import LayerNorm, RMSNorm
from dstrain.ops.activation import TensorMap, identity
from dstrain.ops.kernel import Op
from dstrain.ops.layer_parts import AttentionParts, Blocks, FixedMap, LayerParts, NetworkParts
from dstrain.ops.norm import NormWeights


def stack_kernel(op: Op[Callable[..., Any]], layers: list[LayerParts]) -> Any:
    """What a kernel makes of a stack's layers, by depth: that of the table, or the last one, torch's, if a module is called."""
    output = layers[0].own.output
    if isinstance(output, FixedMap) and all(layer.is_known for layer in layers):
        return op.choose(output.weight.device, output.weight.dtype)(layers)
    return op.kernels[-1].function(layers)


def layer_parts(layer: DecoderLayer | EncoderLayer) -> LayerParts:
    """The layer's weights, and as functions what is not known here."""
    own, source = layer.self_attention, None
    if isinstance(layer, DecoderLayer):
        source = _cross_attention(layer.cross_attention, layer.cross_attention_norm)
    return LayerParts(
        own=_self_attention(own, layer.self_attention_norm),
        source=source,
        network=_network(layer.feed_forward, layer.feed_forward_norm),
        pre_norm=layer.norm_order == "pre",
    )


def _self_attention(module: SelfAttention, norm: nn.Module) -> AttentionParts:
    return AttentionParts(
        norm_part(norm), blocks_part(module.qkv), linear_part(module.out_proj), module.num_kv_heads, module.head_dim
    )


def _cross_attention(module: CrossAttention, norm: nn.Module) -> AttentionParts:
    key_heads = module.kv.blocks["k_proj"] // module.head_dim
    return AttentionParts(norm_part(norm), _single(module.q_proj), linear_part(module.out_proj), key_heads, module.head_dim)


def _network(module: nn.Module, norm: nn.Module) -> NetworkParts:
    if not isinstance(module, FeedForward | GatedFeedForward):
        return NetworkParts(norm_part(norm), lambda x: (x,), module, identity, False)
    gated = isinstance(module, GatedFeedForward)
    first = blocks_part(module.up_gate) if isinstance(module, GatedFeedForward) else _single(module.up_proj)
    return NetworkParts(norm_part(norm), first, linear_part(module.down_proj), module.activation, gated)


def norm_part(module: nn.Module) -> NormWeights | TensorMap:
    """Its weights; itself if it is not known here."""
    match module:
        case LayerNorm():
            return NormWeights(module.weight, module.bias, module.eps, True)
        case RMSNorm():
            return NormWeights(module.weight, None, module.eps, False)
        case nn.Identity():
            return identity
        case _:
            return module


def linear_part(module: nn.Module) -> FixedMap | TensorMap:
    """Its weights; itself if it is not known here."""
    match module:
        case Linear(inputs=None):
            return FixedMap(module.weight, module.bias)
        case _:
            return module


def blocks_part(module: BlockLinear) -> FixedMap | Blocks:
    """The weights of all blocks; itself if they are not known here."""
    return FixedMap(module.weight, module.bias) if isinstance(module, FusedLinear) else module


def _single(module: nn.Module) -> FixedMap | Blocks:
    """A linear map as a block."""
    part = linear_part(module)
    return part if isinstance(part, FixedMap) else lambda x: (part(x),)
