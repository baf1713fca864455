"""Attention masks and ALiBi as additive biases that broadcast to (B, H, T, S). Built once per forward.

A mask is zero at visible keys and the dtype's lowest finite number at masked ones. It is finite, so that a query without visible
keys (a row that is all padding) gets an average of its keys instead of NaN; and so low that any other query gives masked keys a
probability of exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


def mask_bias(masked: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive form of a mask. masked: bool, True at masked keys -> the same shape in `dtype`."""
    zeros = torch.zeros(masked.shape, dtype=dtype, device=masked.device)
    return zeros.masked_fill_(masked, torch.finfo(dtype).min)


def padding_bias(lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor | None:
    """Mask keys after each row's length. (B,) -> (B, 1, 1, S).

    None if nothing needs a mask, as far as that is known without waiting for a GPU.
    """
    if lengths.device.type == "cpu" and bool((lengths == width).all()):
        return None
    columns = torch.arange(width, device=lengths.device)
    return mask_bias(columns >= lengths[:, None], dtype)[:, None, None, :]


def causal_bias(num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Mask later keys; the last query has the position of the last key. -> (T, S)"""
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(num_keys - num_queries)
    return mask_bias(visible.logical_not_(), dtype)


def first_keys_bias(query: Tensor, key: Tensor) -> Tensor:
    """Query t sees keys 0..t. (..., T, K), (..., S, K) -> (T, S)"""
    length = max(query.shape[-2], key.shape[-2])
    return causal_bias(length, length, query.dtype, query.device)[: query.shape[-2], : key.shape[-2]]


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head (Press et al. 2022): 2**(-8 h / n), h = 1 .. n, if n = num_heads is a power of two.

    Other numbers: the slopes of the power of two below, then every second one of the power above.
    """
    power = 1 << (num_heads.bit_length() - 1)
    head_slopes = [2 ** (-8 * head / power) for head in range(1, power + 1)]
    return head_slopes + [2 ** (-8 * head / (2 * power)) for head in range(1, 2 * (num_heads - power), 2)]


def alibi_bias(head_slopes: Tensor, query_positions: Tensor, key_positions: Tensor, *, lead: float = 0.0) -> Tensor:
    """-slope * |i - j| for query i and key j; `lead` is subtracted from the distance to a later key.

    head_slopes: (H,); positions: (T,) and (S,) -> (H, T, S), or (B, T) and (B, S) -> (B, H, T, S)
    """
    distance = key_positions[..., None, :] - query_positions[..., :, None]  # (..., T, S), above zero for later keys
    steps = distance.abs() - lead * (distance > 0) if lead else distance.abs()
    return steps.unsqueeze(-3) * -head_slopes[:, None, None]


@dataclass(frozen=True)
class Alibi:
    """head_slopes: of each head. lead: by how much a later key counts as nearer."""

    head_slopes: tuple[float, ...]
    lead: float = 0.0

    def of_heads(self, part: int, parts: int) -> Alibi:
        """Of one of so many equal parts of the heads."""
        count = len(self.head_slopes) // parts
        return replace(self, head_slopes=self.head_slopes[part * count :][:count])

    def bias(self, query: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """(T,), (S,) -> (H, T, S) or (B, T), (B, S) -> (B, H, T, S)"""
        return alibi_bias(self.on_device(query.device), query, keys, lead=self.lead).to(dtype)

    def on_device(self, device: torch.device) -> Tensor:
        """The slopes, (H,), copied to the device once: numbers of Python go to a GPU in a copy that waits."""
        return _copied(self.head_slopes, device)


@cache
def _copied(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # made under it, a cached tensor could not be used in training later
        return torch.tensor(numbers, device=device)


class RowBias(NamedTuple):
    """bias: added to the scores, broadcasts to (B, H, T, S), None for none. causal: query t sees keys 0..t, without a bias."""

    bias: Tensor | None
    causal: bool = False


def row_bias(lengths: Tensor, width: int, like: Tensor, *, causal: bool, alibi: Alibi | None) -> RowBias:
    """Of whole sequences in padded rows to themselves. lengths: (B,); like: gives device and dtype.

    Causal rows need no mask of padding, for it comes after all real tokens.
    """
    if causal and alibi is None:
        return RowBias(None, causal=True)
    mask = causal_bias(width, width, like.dtype, like.device) if causal else padding_bias(lengths, width, like.dtype)
    if alibi is None:
        return RowBias(mask)
    positions = torch.arange(width, device=like.device)
    distances = alibi.bias(positions, positions, like.dtype)
    return RowBias(distances if mask is None else distances + mask)
