"""A linear map of weights that stay as they are, packed for the products of C++ (`cpp/maps.cpp`).

torch's products pack the weight at every call, or cost some 14 microseconds a call if oneDNN has packed it before: with few rows
more than the product. One of 5 rows and 7,792 x 128 takes 92 microseconds here and 120 by oneDNN, of 40 and more rows as long
(AMD EPYC with AVX512). The copy takes as much memory as the weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from dstrain.ops.cpu.native import function, library


class Map(Structure):
    """`Map` of cpp/layers.h."""

    _fields_ = [("panels", c_void_p), ("bias", c_void_p), ("inputs", c_int64), ("outputs", c_int64)]


def packed_map(weight: Tensor, bias: Tensor | None, memory: list[Tensor]) -> Map:
    """Of weight (O, I) and bias (O,); what it points to is added to `memory`."""
    weight, (outputs, inputs) = weight.detach().contiguous(), weight.shape
    padded = outputs + -outputs % panel_outputs()
    panels, padded_bias = weight.new_empty(padded * inputs), weight.new_zeros(padded)
    function("pack_panels", c_void_p, c_int64, c_int64, c_void_p)(weight.data_ptr(), outputs, inputs, panels.data_ptr())
    if bias is not None:
        padded_bias[:outputs] = bias.detach()
    memory += [panels, padded_bias]
    return Map(panels.data_ptr(), padded_bias.data_ptr(), inputs, outputs)


@cache
def panel_outputs() -> int:
    """Outputs of a panel, by the width of the processor's vectors."""
    return int(library().panel_outputs())


def native_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """weight: (O, I), bias: (O,) -> the map (N, I) -> (N, O) of their present values, not recorded by autograd."""
    memory: list[Tensor] = []
    packed, outputs = packed_map(weight, bias, memory), len(weight)
    apply, address = function("apply_map", c_void_p, c_int64, c_void_p, c_void_p, c_int64), ctypes.addressof(packed)

    def run(x: Tensor) -> Tensor:
        assert packed and memory  # what the addresses belong to
        x = x.contiguous()
        y = x.new_empty(x.shape[0], outputs)
        apply(address, x.shape[0], x.data_ptr(), y.data_ptr(), torch.get_num_threads())
        return y

    return run
