"""The layers of an encoder on whole sentences, without gradient and dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from dstrain.ops.attention import attention
from dstrain.ops.layer_parts import AttentionParts, HeadRotation, LayerParts, fixed_map, network_map, norm_map, qkv_maps


class RowContext(NamedTuple):
    """How the tokens of padded rows attend. bias: added to the scores, broadcasts to (B, H, S, S); None for none. causal: token t
    sees tokens 0..t, without a bias.
    """

    bias: Tensor | None
    causal: bool
    rotation: HeadRotation | None


EncodingLayers = Callable[[Tensor, RowContext], Tensor]
"""(B, S, D) -> (B, S, D), which may overwrite what it was given."""
_Layer = Callable[[Tensor, RowContext, int], Tensor]
"""All tokens of so many rows, (B * S, D) -> (B * S, D)"""


def composed_encoding(layers: Sequence[LayerParts]) -> EncodingLayers:
    """By torch. layers: by depth, one that runs at several is the same object."""
    made = {id(layer): _layer(layer) for layer in layers}
    by_depth = [made[id(layer)] for layer in layers]

    def run(x: Tensor, context: RowContext) -> Tensor:
        tokens = x.flatten(0, 1)
        for layer in by_depth:
            tokens = layer(tokens, context, len(x))
        return tokens.view_as(x)

    return run


def _layer(layer: LayerParts) -> _Layer:
    own_norm, network_norm = norm_map(layer.own.norm), norm_map(layer.network.norm)
    attend, network = _self_attention(layer.own), network_map(layer.network)

    def pre(x: Tensor, context: RowContext, rows: int) -> Tensor:
        x = x + attend(own_norm(x), context, rows)
        return x + network(network_norm(x))

    def post(x: Tensor, context: RowContext, rows: int) -> Tensor:
        x = own_norm(x + attend(x, context, rows))
        return network_norm(x + network(x))

    return pre if layer.pre_norm else post


def _self_attention(part: AttentionParts) -> _Layer:
    qkv, output, head_dim = qkv_maps(part), fixed_map(part.output), part.head_dim

    def run(x: Tensor, context: RowContext, rows: int) -> Tensor:
        query, key, value = (each.reshape(rows, -1, each.shape[-1] // head_dim, head_dim).transpose(1, 2) for each in qkv(x))
        if context.rotation is not None:
            query, key = context.rotation(query), context.rotation(key)
        mixed = attention(query, key, value, bias=context.bias, causal=context.causal)  # (B, H, S, K)
        return output(mixed.transpose(1, 2).reshape(len(x), -1))

    return run
