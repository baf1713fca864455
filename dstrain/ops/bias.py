"""What attention may not see, as small additive values that broadcast to (B, H, T, S). Built once per forward.

Zero where a key is seen, the dtype's lowest finite number where it is not. Finite, so that a query that sees nothing (a row
of padding alone) gets an average of its keys instead of NaN; low enough that the probability is exactly zero elsewhere.
"""

import torch
from torch import Tensor


def hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive form of a mask. hidden: bool, True = not seen -> the same shape in `dtype`."""
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zeros.masked_fill_(hidden, torch.finfo(dtype).min)


def padding_bias(lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor | None:
    """Hide keys after each row's length. (B,) -> (B, 1, 1, S).

    None if nothing needs hiding, as far as that is known without waiting for a GPU.
    """
    if lengths.device.type == "cpu" and bool((lengths == width).all()):
        return None
    columns = torch.arange(width, device=lengths.device)
    return hide(columns >= lengths[:, None], dtype)[:, None, None, :]


def causal_bias(num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Hide later keys; the last query is level with the last key. -> (T, S)"""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(num_keys - num_queries)
    return hide(seen.logical_not_(), dtype)


def segment_bias(query_segments: Tensor, key_segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Hide keys of other segments (packing). (B, T), (B, S) -> (B, 1, T, S)"""
    return hide(query_segments[:, :, None] != key_segments[:, None, :], dtype)[:, None]


def segment_lengths(segments: Tensor) -> Tensor:
    """How many tokens each token's segment has. (B, T) -> (B, T)"""
    return (segments[:, :, None] == segments[:, None, :]).sum(-1)


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head (Press et al. 2022): 2**(-8 h / n), h = 1 .. n, where n = num_heads is a power of two.

    Other numbers: the slopes of the power of two below, then every second one of the power above.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * head / power) for head in range(1, power + 1)]
    return slopes + [2 ** (-8 * head / (2 * power)) for head in range(1, 2 * (num_heads - power), 2)]


def alibi_bias(slopes: Tensor, query_positions: Tensor, key_positions: Tensor, *, lead: float = 0.0) -> Tensor:
    """-slope * |i - j| for query i and key j, with `lead` off the distance to a later key.

    slopes: (H,); positions: (T,) and (S,) -> (H, T, S), or (B, T) and (B, S) -> (B, H, T, S)
    """
    distance = key_positions[..., None, :] - query_positions[..., :, None]  # (..., T, S), above zero for later keys
    steps = distance.abs() - lead * (distance > 0) if lead else distance.abs()
    return steps.unsqueeze(-3) * -slopes[:, None, None]
