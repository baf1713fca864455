"""Rotary positions (RoPE, Su et al. 2021): pairs of features turn by position times frequency, so that scores see distances only.

Frequencies are float32 numbers of a head's pairs, slowest last. Scalings change the frequencies; a scaling that follows the
length of a sequence gives each row its own. Cosines and sines carry the factor by which queries and keys are multiplied besides
(YaRN's attention factor; 1 elsewhere).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["half_split", "interleaved"]


class CosSin(NamedTuple):
    """cos, sin: (T, P) or (B, 1, T, P) for the P pairs of a head that turn; in the dtype of queries and keys."""

    cos: Tensor
    sin: Tensor


class Yarn(NamedTuple):
    """YaRN's constants; see `yarn_frequencies`."""

    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    extrapolation_factor: float = 1.0
    attention_factor: float = 1.0


def frequencies(dim: int, theta: float | Tensor) -> Tensor:
    """theta**(-2 i / dim) for i = 0 .. dim / 2 - 1. theta: a number or (..., 1) -> (dim / 2,) or (..., dim / 2), float32"""
    if not isinstance(theta, Tensor):
        theta = torch.tensor(theta, dtype=torch.float32, device="cpu")
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=theta.device) / dim
    return 1.0 / theta**exponents


def ntk_theta(theta: float, dim: int, factor: float, original_length: int, lengths: Tensor) -> Tensor:
    """The base of each length L under dynamic NTK scaling, of the shape of `lengths`.

    theta * (factor L / M - (factor - 1))**(dim / (dim - 2)) for L above M = original_length, else theta. With a single pair
    (dim = 2) nothing depends on the base.
    """
    stretch = factor * lengths.clamp_min(original_length).float() / original_length - (factor - 1)
    return theta * stretch ** (dim / max(dim - 2, 1))


def yarn_frequencies(dim: int, theta: float, factor: Tensor, yarn: Yarn) -> Tensor:
    """Frequencies under YaRN (Peng et al. 2023, "NTK-by-parts"). factor: (..., 1), >= 1 -> (..., dim / 2)

    A pair that turns more than beta_fast times within the original length keeps its frequency, one that turns less than
    beta_slow times has it divided by the factor; in between goes a straight line over pair numbers, whose ends are rounded
    outward to whole pairs. That is how the paper's code and Transformers (`truncate`) do it; the paper's text draws the line over
    numbers of turns instead.
    """
    base = frequencies(dim, theta).to(factor.device)

    def pair_of(turns: float) -> float:
        return dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_of(yarn.beta_fast)), 0), min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=factor.device)
    ramp = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
    kept = (1 - ramp) * yarn.extrapolation_factor
    return base / factor * (1 - kept) + base * kept


def yarn_attention_scaling(factor: Tensor, yarn: Yarn) -> Tensor:
    """What queries and keys are multiplied by: attention_factor * (0.1 ln(factor) + 1). factor: (...), >= 1 -> (...)"""
    return yarn.attention_factor * (0.1 * factor.log() + 1)


def cos_sin(positions: Tensor, inv_freq: Tensor, attention_scaling: Tensor | float, dtype: torch.dtype) -> CosSin:
    """Cosines and sines. positions: (T,) or (B, T); frequency: (P,) or (B or 1, T or 1, P); amplitude broadcasts likewise."""
    angles = positions[..., None].float() * inv_freq
    cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
    if angles.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, T, P): the same for all heads
    return CosSin(cos.to(dtype), sin.to(dtype))


def rotate(x: Tensor, by: CosSin, layout: Layout) -> Tensor:
    """Rotate the first 2 P features of each head, leave the rest. x: (B, H, T, K) -> (B, H, T, K)"""
    dim = 2 * by.cos.shape[-1]
    turning = x[..., :dim]
    first, second = turning.chunk(2, dim=-1) if layout == "half_split" else (turning[..., 0::2], turning[..., 1::2])
    turned = (first * by.cos - second * by.sin, second * by.cos + first * by.sin)
    whole = torch.cat(turned, dim=-1) if layout == "half_split" else torch.stack(turned, dim=-1).flatten(-2)
    return whole if dim == x.shape[-1] else torch.cat([whole, x[..., dim:]], dim=-1)
