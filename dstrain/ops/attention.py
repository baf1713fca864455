"""Scaled dot-product attention: softmax(q k' / sqrt(K) + bias) v.

The fast version is torch's `scaled_dot_product_attention`, which picks the kernel; it takes strided views, so no input needs
to be copied into place. With fewer key than query heads, each key head serves a block of query heads (GQA, MQA).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """query: (B, H, T, K); key, value: (B, H or fewer, S, K); bias: broadcasts to (B, H, T, S) -> (B, H, T, K).

    causal: query t sees keys 0..t; not together with `bias`.
    """
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """The same, written out."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() / math.sqrt(query.shape[-1])  # (B, H, T, S)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if bias is not None:
        scores = scores + bias
    probabilities = F.dropout(scores.softmax(-1).to(value.dtype), dropout, training=dropout > 0)
    return probabilities @ value
