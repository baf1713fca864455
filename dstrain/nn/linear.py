"""Linear maps. Initial weights are not made here: a model is filled from a `WeightSource` by name (`models/weights.py`).

Projections that read the same input (q, k, v of self-attention; k, v of cross-attention; both halves of a gated network) are one
module with named blocks. It comes in two kinds that compute the same: fused, one weight with row blocks and one matrix product;
separate, one linear map a block, which adapters can address. On disk blocks are always separate.

Over a tensor group a map is cut by its outputs (`outputs`: x is whole, y is this rank's part) or by its inputs (`inputs`: x is
this rank's part, y is whole). The first followed by the second costs one all-reduce in forward and one in backward. A fused map
is cut block by block, so that a rank has the queries, keys and values of the same heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dstrain.ops.linear import linear
from dstrain.ops.pieces import split
from dstrain.parallel.collectives import reduce_from
from dstrain.parallel.group import Group
from dstrain.parallel.tensor import ParameterShard, even_shard, group_size


class Linear(nn.Linear):
    """(..., I) -> (..., O), without initial values. outputs, inputs: the tensor group over which they are cut, None for whole."""

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        outputs: Group | None = None,
        inputs: Group | None = None,
    ) -> None:
        super().__init__(in_features // group_size(inputs), out_features // group_size(outputs), bias=bias)
        self.outputs = outputs
        self.inputs = inputs

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        if self.inputs is None:
            return linear(x, self.weight, self.bias, group=self.outputs)
        total = reduce_from(linear(x, self.weight), self.inputs)
        return total if self.bias is None else total + self.bias

    def shards(self) -> dict[str, ParameterShard]:
        """Of weight and bias."""
        if self.inputs is not None:
            return {"weight": even_shard(1, self.in_features, self.inputs)}
        if self.outputs is not None:
            return dict.fromkeys(("weight", "bias"), even_shard(0, self.out_features, self.outputs))
        return {}


class FusedLinear(nn.Module):
    """Several linear maps of one input as a single matrix product. blocks: name -> output size, in row order.

    outputs: the tensor group over which each block is cut.
    """

    def __init__(self, in_features: int, blocks: Mapping[str, int], *, bias: bool = True, outputs: Group | None = None) -> None:
        super().__init__()
        self.outputs = outputs
        self.blocks = {name: size // group_size(outputs) for name, size in blocks.items()}
        self.sizes = list(self.blocks.values())
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), in_features))
        self.bias = nn.Parameter(torch.empty(sum(self.sizes))) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., I) -> one (..., O) per block, views of one tensor."""
        return split(linear(x, self.weight, self.bias, group=self.outputs), self.sizes)


class SeparateLinear(nn.Module):
    """The same maps, each a `Linear` of its own."""

    def __init__(self, in_features: int, blocks: Mapping[str, int], *, bias: bool = True, outputs: Group | None = None) -> None:
        super().__init__()
        self.blocks = {name: size // group_size(outputs) for name, size in blocks.items()}
        for name, size in blocks.items():
            self.add_module(name, Linear(in_features, size, bias=bias, outputs=outputs))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., I) -> one (..., O) per block."""
        return tuple(self.get_submodule(name)(x) for name in self.blocks)


BlockLinear = FusedLinear | SeparateLinear
