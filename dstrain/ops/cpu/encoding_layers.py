"""The layers of an encoder on whole sentences in one call of C++ (`cpp/encoding.cpp`)."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, c_int64, c_void_p

import torch
from torch import Tensor

from dstrain.ops.cpu.layers import PackedLayers, Rotated
from dstrain.ops.cpu.native import function
from dstrain.ops.encoding_layers import EncodingLayers, RowContext
from dstrain.ops.layer_parts import LayerParts


class _Batch(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("sentences", "length", "model_dim", "causal")),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("bias_of_sentence", "bias_of_head", "bias_of_query")),
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, c_int64) for name in ("pairs", "of_sentence", "interleaved")),
    ]


def native_encoding(layers: Sequence[LayerParts]) -> EncodingLayers:
    """Of layers that are all given by weights. layers: by depth, one that runs at several is the same object."""
    packed = PackedLayers(layers)
    encode = function("encode_layers", c_void_p, c_int64, c_void_p, c_void_p, c_int64)

    def run(x: Tensor, context: RowContext) -> Tensor:
        x = x.contiguous()
        sentences, length, _ = x.shape
        bias = x.new_zeros(length) if context.bias is None else context.bias
        bias = bias.expand(*([1] * (4 - bias.ndim)), *bias.shape[:-1], length)
        if bias.stride(-1) != 1:
            bias = bias.contiguous()
        steps = (0 if size == 1 else step for size, step in zip(bias.shape[:3], bias.stride()[:3], strict=True))
        rotated = Rotated.of(context.rotation, sentences)
        batch = _Batch(*x.shape, context.causal, bias.data_ptr(), *steps, *rotated.fields())
        encode(packed.pointers, packed.depth, addressof(batch), x.data_ptr(), torch.get_num_threads())
        return x

    return run
