"""The layers of a stack as their weights: what the kernels of generation take (`decoding_layers.py`, `encoding_layers.py`).

A part that is not given by weights (an adapter, a map cut by its inputs) is a function, which only the kernels of torch call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dstrain.ops.activation import ACTIVATIONS, TensorMap, identity
from dstrain.ops.kernels import FIXED_LINEAR
from dstrain.ops.norm import NormWeights, plain_norm
from dstrain.ops.rotary import CosSin, RotaryLayout


class FixedMap(NamedTuple):
    """A linear map of weights that stay as they are. weight: (O, I); bias: (O,) or None."""

    weight: Tensor
    bias: Tensor | None


Blocks = Callable[[Tensor], Sequence[Tensor]]
"""(N, I) -> (N, O) for each of some linear maps of one input"""


class AttentionParts(NamedTuple):
    """input: queries, then keys and values if they are of the same tokens; of a FixedMap in this order."""

    norm: NormWeights | TensorMap
    input: FixedMap | Blocks
    output: FixedMap | TensorMap
    num_kv_heads: int
    head_dim: int


class NetworkParts(NamedTuple):
    """The position-wise network. input: what goes through and, if `gated`, the gate; of a FixedMap in this order."""

    norm: NormWeights | TensorMap
    input: FixedMap | Blocks
    output: FixedMap | TensorMap
    activation: TensorMap
    gated: bool


class LayerParts(NamedTuple):
    """A layer. own: attention to tokens of the same side. source: of a decoder's to those of the source, None for none."""

    own: AttentionParts
    source: AttentionParts | None
    network: NetworkParts
    pre_norm: bool

    @property
    def is_known(self) -> bool:
        """Whether all of it is given by weights."""
        parts = (part for part in (self.own, self.source, self.network) if part is not None)
        has_weights = all(isinstance(each, FixedMap | NormWeights) or each is identity for part in parts for each in part[:3])
        return has_weights and self.network.activation in ACTIVATIONS.values()


class HeadRotation(Protocol):
    """The rotation of queries and keys. (..., H, 1, K) -> (..., H, 1, K)"""

    @property
    def cos_sin(self) -> CosSin:
        """Of the new tokens."""
        ...

    @property
    def layout(self) -> RotaryLayout:
        """Which features are a pair."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate."""
        ...


def fixed_map(part: FixedMap | TensorMap) -> TensorMap:
    """As a function. (N, I) -> (N, O)"""
    if not isinstance(part, FixedMap):
        return part
    prepare = FIXED_LINEAR.choose(part.weight.device, part.weight.dtype, size=part.weight.numel())
    return prepare(*part)


def block_maps(part: FixedMap | Blocks, sizes: Sequence[int]) -> Blocks:
    """As a function. sizes: outputs of each block, of which one may be -1, what is left."""
    if not isinstance(part, FixedMap):
        return part
    product, total = fixed_map(part), len(part.weight)
    whole = [size if size >= 0 else total - sum(sizes) - 1 for size in sizes]
    return lambda x: torch.split_with_sizes(product(x), whole, -1)


def qkv_maps(part: AttentionParts) -> Blocks:
    """Queries, keys and values of self-attention."""
    of_keys = part.num_kv_heads * part.head_dim
    return block_maps(part.input, (-1, of_keys, of_keys))


def norm_map(part: NormWeights | TensorMap) -> TensorMap:
    """As a function. (..., D) -> (..., D)"""
    if not isinstance(part, NormWeights):
        return part
    if part.centered:  # without the call of Python between, which costs as much as the norm of few rows
        shape, weight, bias, eps = list(part.weight.shape), part.weight, part.bias, part.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    return lambda x: plain_norm(x, part)


def network_map(part: NetworkParts) -> TensorMap:
    """As a function, without its norm. (N, D) -> (N, D)"""
    output, activation = fixed_map(part.output), part.activation
    half = len(part.input.weight) // 2 if isinstance(part.input, FixedMap) and part.gated else -1
    product = block_maps(part.input, (half, half) if part.gated else (-1,))

    def plain(x: Tensor) -> Tensor:
        (up,) = product(x)
        return output(activation(up))

    def gated(x: Tensor) -> Tensor:
        up, gate = product(x)
        return output(activation(gate) * up)

    return gated if part.gated else plain
