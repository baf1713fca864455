"""A decoder's step of one token a row in one call of C++ (`cpp/decoding.cpp`)."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, c_int64, c_void_p

import torch
from torch import Tensor

from dstrain.ops.cpu.layers import PackedLayers, Rotated
from dstrain.ops.cpu.native import function
from dstrain.ops.decoding_layers import DecodingLayers, DecodingStep
from dstrain.ops.layer_parts import LayerParts


class _Keys(Structure):
    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("of_row", c_int64), ("of_head", c_int64), ("of_position", c_int64)]


class _Bias(Structure):
    _fields_ = [("values", c_void_p), ("of_key_head", c_int64), ("of_query", c_int64)]


class _Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "model_dim", "rows_per_sentence", "position", "source_length")),
        ("bias", _Bias),
        ("source_bias", _Bias),
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, c_int64) for name in ("pairs", "of_row", "interleaved")),
    ]


def native_layers(layers: Sequence[LayerParts]) -> DecodingLayers:
    """Of layers that are all given by weights. layers: by depth, one that runs at several is the same object."""
    packed = PackedLayers(layers)
    decode = function("decode_layers", c_void_p, c_int64, *[c_void_p] * 4, c_int64)

    def run(x: Tensor, step: DecodingStep) -> Tensor:
        x, position, source = x.contiguous(), step.cache.length, step.source
        source_length, sentences = (source[0][0].shape[2], len(source[0][0])) if source else (1, len(x))
        if position >= step.cache.buffers[0].shape[3]:
            raise IndexError(f"position {position} of a cache of {step.cache.buffers[0].shape[3]}")
        rotated = Rotated.of(step.rotation, len(x))
        bias, source_bias = _of_keys(step.bias, position + 1), _of_keys(step.source_bias, source_length)
        sizes = *x.shape, len(x) // sentences, position, source_length
        arguments = _Step(*sizes, _bias(bias), _bias(source_bias), *rotated.fields())
        cached = (_Keys * packed.depth)(*map(_cached, step.cache.buffers))
        read = (_Keys * len(source))(*(_Keys(keys.data_ptr(), values.data_ptr(), *keys.stride()[:3]) for keys, values in source))
        decode(packed.pointers, packed.depth, addressof(arguments), cached, read, x.data_ptr(), torch.get_num_threads())
        return x

    return run


def _cached(buffer: Tensor) -> _Keys:
    """(2, N, H, max, K)"""
    of_half, *steps, _ = buffer.stride()
    start = buffer.data_ptr()
    return _Keys(start, start + of_half * buffer.element_size(), *steps)


def _of_keys(bias: Tensor, length: int) -> Tensor:
    """(P or 1, Q or 1, S or 1) -> with a number for each of `length` keys, adjacent."""
    if bias.shape[2] < length:
        bias = bias.expand(-1, -1, length)
    return bias if bias.stride(2) == 1 else bias.contiguous()


def _bias(bias: Tensor) -> _Bias:
    """What `_of_keys` gave."""
    steps = (0 if size == 1 else step for size, step in zip(bias.shape[:2], bias.stride()[:2], strict=True))
    return _Bias(bias.data_ptr(), *steps)
