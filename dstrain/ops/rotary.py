"""Rotary position embedding (RoPE, Su et al. 2021): each pair of a head's features is rotated by position times inverse
frequency, so that attention scores depend on distances only.

Inverse frequencies are float32, one per pair, the slowest last. Scalings change them; a dynamic scaling gives each sequence its
own by its length. Cosines and sines include the attention scaling of queries and keys (YaRN; 1 elsewhere).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

_N = TypeVar("_N", float, Tensor)
RotaryLayout = Literal["half_split", "interleaved"]


class CosSin(NamedTuple):
    """cos, sin: (T, P) or (B or none, 1, T, P) for the P rotated pairs of a head; in the dtype of queries and keys."""

    cos: Tensor
    sin: Tensor


class Yarn(NamedTuple):
    """YaRN's constants; see `yarn_inv_freq`."""

    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    extrapolation_factor: float = 1.0
    attention_factor: float = 1.0


def inverse_frequencies(dim: int, theta: float | Tensor) -> Tensor:
    """theta**(-2 i / dim) for i = 0 .. dim / 2 - 1. theta: a number or (..., 1) -> (dim / 2,) or (..., dim / 2), float32"""
    if not isinstance(theta, Tensor):
        theta = torch.tensor(theta, dtype=torch.float32, device="cpu")
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=theta.device) / dim
    return 1.0 / theta**exponents


def stretched_theta(theta: float, dim: int, stretch: _N) -> _N:
    """The base under which the slowest pair of `dim` features turns `stretch` times slower, and the fastest as before.

    theta * stretch**(dim / (dim - 2)). With a single pair (dim = 2) nothing depends on the base.
    """
    exponent: float = dim / max(dim - 2, 1)
    scale: _N = stretch**exponent
    return theta * scale


def ntk_theta(theta: float, dim: int, factor: float, original_length: int, lengths: Tensor) -> Tensor:
    """The base of each length L under dynamic NTK scaling, of the shape of `lengths`.

    `stretched_theta` by factor L / M - (factor - 1) for L above M = original_length, else theta.
    """
    return stretched_theta(theta, dim, factor * lengths.clamp_min(original_length).float() / original_length - (factor - 1))


def yarn_inv_freq(dim: int, theta: float, factor: Tensor, yarn: Yarn) -> Tensor:
    """Frequencies under YaRN (Peng et al. 2023, "NTK-by-parts"). factor: (..., 1), >= 1 -> (..., dim / 2)

    A pair with more than beta_fast rotations within the original length keeps its frequency, one with less than beta_slow has it
    divided by the factor; between them the frequency is interpolated linearly over the index of the pair, with both ends rounded
    outward to whole pairs. So do the paper's code and Transformers (`truncate`); the paper's text interpolates over the number of
    rotations instead.
    """
    base = _fixed_frequencies(dim, theta, factor.device)

    def pair_index(rotations: float) -> float:
        return dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_index(yarn.beta_fast)), 0), min(math.ceil(pair_index(yarn.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=factor.device)
    ramp = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
    kept = (1 - ramp) * yarn.extrapolation_factor
    return base / factor * (1 - kept) + base * kept


@cache
def _fixed_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """Those of the CPU, copied to the device once: a GPU would be waited for."""
    with torch.inference_mode(False):  # made under it, a cached tensor could not be used in training later
        return inverse_frequencies(dim, theta).to(device)


def yarn_attention_scaling(factor: Tensor, yarn: Yarn) -> Tensor:
    """The factor of queries and keys: attention_factor * (0.1 ln(factor) + 1). factor: (...), >= 1 -> (...)"""
    return yarn.attention_factor * (0.1 * factor.log() + 1)


def compute_cos_sin(positions: Tensor, inv_freq: Tensor, attention_scaling: Tensor | float, dtype: torch.dtype) -> CosSin:
    """Cosines and sines. positions: (T,) or (B, T); inv_freq: (P,), (T, P) or (B or 1, T or 1, P); the scaling broadcasts."""
    angles = positions[..., None].float() * inv_freq
    cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
    if angles.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, T, P): the same for all heads
    return CosSin(cos.to(dtype), sin.to(dtype))


def apply_rotary(x: Tensor, cos_sin: CosSin, layout: RotaryLayout) -> Tensor:
    """Rotate the first 2 P features of each head, leave the rest. x: (..., H, T, K) -> (..., H, T, K)"""
    cos, sin = cos_sin
    dim = 2 * cos.shape[-1]
    pairs = x[..., :dim]
    first, second = pairs.chunk(2, dim=-1) if layout == "half_split" else (pairs[..., 0::2], pairs[..., 1::2])
    parts = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.cat(parts, dim=-1) if layout == "half_split" else torch.stack(parts, dim=-1).flatten(-2)
    return rotated if dim == x.shape[-1] else torch.cat([rotated, x[..., dim:]], dim=-1)
