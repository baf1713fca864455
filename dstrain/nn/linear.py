"""Linear maps. Initial weights are not made here: a model is filled from a `WeightSource` by name (`models/weights.py`).

Projections that read the same input (q, k, v of self-attention; k, v of cross-attention; both halves of a gated network) are one
module with named blocks. It comes in two kinds that compute the same: fused, one weight with row blocks and one matrix product;
separate, one linear map a block, which adapters can address. On disk blocks are always separate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """(..., I) -> (..., O), without initial values."""

    weight: nn.Parameter

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        return F.linear(x, self.weight, self.bias)


class FusedLinear(nn.Module):
    """Several linear maps of one input as a single matrix product. blocks: name -> output size, in row order."""

    def __init__(self, in_features: int, blocks: Mapping[str, int], *, bias: bool = True) -> None:
        super().__init__()
        self.blocks = dict(blocks)
        self.sizes = list(blocks.values())
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), in_features))
        self.bias = nn.Parameter(torch.empty(sum(self.sizes))) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., I) -> one (..., O) per block, views of one tensor."""
        return torch.split(F.linear(x, self.weight, self.bias), self.sizes, dim=-1)


class SeparateLinear(nn.Module):
    """The same maps, each a `Linear` of its own."""

    def __init__(self, in_features: int, blocks: Mapping[str, int], *, bias: bool = True) -> None:
        super().__init__()
        self.blocks = dict(blocks)
        for name, size in blocks.items():
            self.add_module(name, Linear(in_features, size, bias=bias))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., I) -> one (..., O) per block."""
        return tuple(self.get_submodule(name)(x) for name in self.blocks)


BlockLinear = FusedLinear | SeparateLinear
