"""The layers of a decoder in a step of one token a row.

`composed_layers` runs them by torch, part by part. So little is computed in a step that calling modules takes a CPU as long as
the products do; here each part becomes the functions that it calls.

Keys are read in whole blocks of `KEY_BLOCK` positions, see `cpu/attention.py`: a bias hides those that do not exist yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from dstrain.ops.activation import TensorMap
from dstrain.ops.kernels import DECODING_ATTENTION, DecodingAttention
from dstrain.ops.layer_parts import (
    AttentionParts,
    HeadRotation,
    LayerParts,
    block_maps,
    fixed_map,
    network_map,
    norm_map,
    qkv_maps,
)
from dstrain.ops.norm import NormWeights

SourceKeys = tuple[Tensor, Tensor]
"""Keys and values of the source at one depth, (B, H or fewer, S, K) each."""


class Cache(Protocol):
    """Keys and values of the tokens so far."""

    length: int

    @property
    def buffers(self) -> Sequence[Tensor]:
        """By depth, (2, N, H, max, K) each; the features of a head are adjacent."""
        ...

    def put(self, depth: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the new token, (N, H, K) each -> all, (N * H, S, K) each, in whole blocks."""
        ...


class DecodingStep(NamedTuple):
    """What the layers share. source: by depth. bias, source_bias: added to the scores, (P or 1, Q or 1, S), where P counts key
    heads of rows or of sentences, Q the queries that each has.
    """

    cache: Cache
    rotation: HeadRotation | None
    bias: Tensor
    source: Sequence[SourceKeys]
    source_bias: Tensor


DecodingLayers = Callable[[Tensor, DecodingStep], Tensor]
"""(N, D) -> (N, D), which may overwrite what it was given."""
_Sublayer = Callable[[Tensor, DecodingStep, int, DecodingAttention], Tensor]
"""(N, D) at a depth -> (N, D)"""


def composed_layers(layers: Sequence[LayerParts]) -> DecodingLayers:
    """By torch. layers: by depth, one that runs at several is the same object."""
    made = {id(layer): _sublayers(layer) for layer in layers}
    by_depth = [made[id(layer)] for layer in layers]

    def run(x: Tensor, step: DecodingStep) -> Tensor:
        attend = DECODING_ATTENTION.choose(x.device, x.dtype)
        for depth, sublayers in enumerate(by_depth):
            for sublayer in sublayers:
                x = sublayer(x, step, depth, attend)
        return x

    return run


def _sublayers(layer: LayerParts) -> list[_Sublayer]:
    parts = [_with_residual(layer, layer.own.norm, _self_attention(layer.own))]
    if layer.source is not None:
        parts.append(_with_residual(layer, layer.source.norm, _source_attention(layer.source)))
    network = network_map(layer.network)
    return [*parts, _with_residual(layer, layer.network.norm, lambda x, step, depth, attend: network(x))]


def _with_residual(layer: LayerParts, norm_part: NormWeights | TensorMap, sublayer: _Sublayer) -> _Sublayer:
    norm = norm_map(norm_part)

    def pre(x: Tensor, step: DecodingStep, depth: int, attend: DecodingAttention) -> Tensor:
        return x + sublayer(norm(x), step, depth, attend)

    def post(x: Tensor, step: DecodingStep, depth: int, attend: DecodingAttention) -> Tensor:
        return norm(x + sublayer(x, step, depth, attend))

    return pre if layer.pre_norm else post


def _self_attention(part: AttentionParts) -> _Sublayer:
    qkv, output, head_dim = qkv_maps(part), fixed_map(part.output), part.head_dim

    def run(x: Tensor, step: DecodingStep, depth: int, attend: DecodingAttention) -> Tensor:
        rows = x.shape[0]
        query, key, value = [each.view(rows, -1, head_dim) for each in qkv(x)]  # (N, H or fewer, K)
        if step.rotation is not None:
            query, key = (step.rotation(each.unsqueeze(2)).squeeze(2) for each in (query, key))
        keys, values = step.cache.put(depth, key, value)
        mixed = attend(query.reshape(keys.shape[0], -1, head_dim), keys, values, step.bias)
        return output(mixed.view(rows, -1))

    return run


def _source_attention(part: AttentionParts) -> _Sublayer:
    project, output, head_dim = block_maps(part.input, (-1,)), fixed_map(part.output), part.head_dim

    def run(x: Tensor, step: DecodingStep, depth: int, attend: DecodingAttention) -> Tensor:
        keys, values = step.source[depth]
        sentences, key_heads, width, _ = keys.shape
        together = sentences * key_heads
        (query,) = project(x)  # (N, H * K)
        queries = query.shape[1] // key_heads
        query = query.view(sentences, -1, key_heads, queries).transpose(1, 2).reshape(together, -1, head_dim)
        keys, values = keys.view(together, width, head_dim), values.view(together, width, head_dim)
        mixed = attend(query, keys, values, step.source_bias).view(sentences, key_heads, -1, queries)
        return output(mixed.transpose(1, 2).reshape(x.shape[0], -1))

    return run
