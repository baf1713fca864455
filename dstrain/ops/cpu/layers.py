"""The structures of `cpp/layers.h`: layers whose weights are packed, for the kernels of decoding and encoding."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import NamedTuple

from torch import Tensor

from dstrain.ops.activation import ACTIVATIONS, TensorMap
from dstrain.ops.cpu.panels import Map, packed_map
from dstrain.ops.layer_parts import AttentionParts, Blocks, FixedMap, HeadRotation, LayerParts, NetworkParts
from dstrain.ops.norm import NormWeights

_ACTIVATIONS = {function: number for number, function in enumerate(ACTIVATIONS.values())}  # in the order of cpp/layers.h
_NO_NORM, _LAYER_NORM, _RMS_NORM = range(3)


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_double), ("kind", c_int64)]


class _Attention(Structure):
    _fields_ = [("norm", _Norm), ("input", Map), ("output", Map), ("heads", c_int64), ("key_heads", c_int64)]


class _Network(Structure):
    _fields_ = [("norm", _Norm), ("input", Map), ("output", Map), ("activation", c_int64), ("gated", c_int64)]


class _Layer(Structure):
    _fields_ = [("own", _Attention), ("source", _Attention), ("network", _Network), ("head_dim", c_int64), ("pre_norm", c_int64)]


class Rotated(NamedTuple):
    """cos, sin: adjacent, None for no rotation. of_row: from one row to the next, 0 if all are rotated alike."""

    cos: Tensor | None
    sin: Tensor | None
    pairs: int
    of_row: int
    interleaved: bool

    @classmethod
    def of(cls, rotation: HeadRotation | None, rows: int) -> Rotated:
        """rows: of which each may have its own."""
        if rotation is None:
            return cls(None, None, 0, 0, False)
        cos, sin = (part.contiguous() for part in rotation.cos_sin)
        of_row = cos.numel() // rows if cos.ndim > 2 and cos.shape[0] == rows else 0
        return cls(cos, sin, cos.shape[-1], of_row, rotation.layout == "interleaved")

    def fields(self) -> tuple[int | None, ...]:
        """As the structures have them."""
        return *(None if part is None else part.data_ptr() for part in (self.cos, self.sin)), *self[2:]


class PackedLayers:
    """Layers that are all given by weights. layers: by depth, one that runs at several is the same object."""

    def __init__(self, layers: Sequence[LayerParts]) -> None:
        self._memory: list[Tensor] = []  # what the structures point to
        self._packed = {id(layer): _pack(layer, self._memory) for layer in layers}
        self.depth = len(layers)
        self.pointers = (c_void_p * len(layers))(*(ctypes.addressof(self._packed[id(layer)]) for layer in layers))


def _pack(parts: LayerParts, memory: list[Tensor]) -> _Layer:
    return _Layer(
        own=_attention(parts.own, 2 * parts.own.num_kv_heads, memory),
        source=_Attention() if parts.source is None else _attention(parts.source, 0, memory),
        network=_network(parts.network, memory),
        head_dim=parts.own.head_dim,
        pre_norm=parts.pre_norm,
    )


def _attention(part: AttentionParts, heads_of_keys: int, memory: list[Tensor]) -> _Attention:
    """heads_of_keys: of keys and of values, that the input map gives behind those of queries."""
    assert isinstance(part.input, FixedMap)
    heads = len(part.input.weight) // part.head_dim - heads_of_keys
    return _Attention(_norm(part.norm, memory), _map(part.input, memory), _map(part.output, memory), heads, part.num_kv_heads)


def _network(part: NetworkParts, memory: list[Tensor]) -> _Network:
    return _Network(
        _norm(part.norm, memory),
        _map(part.input, memory),
        _map(part.output, memory),
        _ACTIVATIONS[part.activation],
        part.gated,
    )


def _norm(part: NormWeights | TensorMap, memory: list[Tensor]) -> _Norm:
    if not isinstance(part, NormWeights):
        return _Norm(kind=_NO_NORM)
    weight, bias = (None if each is None else each.detach().contiguous() for each in part[:2])
    memory += [each for each in (weight, bias) if each is not None]
    kind = _LAYER_NORM if part.centered else _RMS_NORM
    return _Norm(*(None if each is None else each.data_ptr() for each in (weight, bias)), part.eps, kind)


def _map(part: FixedMap | Blocks | TensorMap, memory: list[Tensor]) -> Map:
    assert isinstance(part, FixedMap)
    return packed_map(*part, memory)
