"""From the configuration of rotary positions to the module: the frequency of each pair of a head's features.

Only numbers and functions are made here. Tables are made in forward: made in a constructor, they would follow torch's default
device and dtype (frequencies in bf16 are 0.4 rad off at position 1,000).
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from dstrain.models.position_config import (
    DynamicNtkScaling,
    DynamicYarnScaling,
    LinearScaling,
    NoScaling,
    NtkScaling,
    RotaryPosition,
    YarnScaling,
)
from dstrain.nn.rotary import LengthRotary, Rotary, RotaryFrequencies, RotaryPart
from dstrain.ops.rotary import Yarn, inverse_frequencies, ntk_theta, stretched_theta, yarn_attention_scaling, yarn_inv_freq


def build_rotary(config: RotaryPosition, head_dim: int) -> RotaryPart:
    """The rotary positions of heads of `head_dim` features."""
    dim, theta, layout = config.rotated_features(head_dim), config.theta, config.layout
    match config.scaling:
        case NoScaling():
            return Rotary(lambda: RotaryFrequencies(inverse_frequencies(dim, theta), 1.0), layout)
        case LinearScaling(factor=factor):
            return Rotary(lambda: RotaryFrequencies(inverse_frequencies(dim, theta) / factor, 1.0), layout)
        case NtkScaling(factor=factor):
            return Rotary(lambda: RotaryFrequencies(inverse_frequencies(dim, stretched_theta(theta, dim, factor)), 1.0), layout)
        case DynamicNtkScaling() as ntk:

            def by_base(lengths: Tensor) -> RotaryFrequencies:
                bases = ntk_theta(theta, dim, ntk.factor, ntk.original_length, lengths)
                return RotaryFrequencies(inverse_frequencies(dim, bases.unsqueeze(-1)), 1.0)

            return LengthRotary(by_base, layout, max_static_length=ntk.original_length)
        case DynamicYarnScaling() as scaling:
            since = scaling.from_length or scaling.original_length

            def by_factor(lengths: Tensor) -> RotaryFrequencies:
                return _yarn(dim, theta, scaling, (lengths.float() / since).clamp_min(scaling.factor).unsqueeze(-1))

            return LengthRotary(by_factor, layout, max_static_length=int(since * scaling.factor))
        case YarnScaling() as scaling:

            def fixed() -> RotaryFrequencies:
                factor = torch.tensor([scaling.factor], dtype=torch.float32, device="cpu")
                return _yarn(dim, theta, scaling, factor)

            return Rotary(fixed, layout)
        case other:
            assert_never(other)


def _yarn(dim: int, theta: float, scaling: YarnScaling, factor: Tensor) -> RotaryFrequencies:
    constants = Yarn(
        original_length=scaling.original_length,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        extrapolation_factor=scaling.extrapolation_factor,
        attention_factor=scaling.attention_factor,
    )
    return RotaryFrequencies(yarn_inv_freq(dim, theta, factor, constants), yarn_attention_scaling(factor, constants))
