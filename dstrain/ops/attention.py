"""Scaled dot-product attention: softmax(q k' / sqrt(K) + bias) v.

It is torch's `scaled_dot_product_attention`, which picks the kernel and takes strided views, so no input is copied; in training
the kernel is chosen by the table (`kernels.py`). With fewer key than query heads, each key head serves a block of query heads
(GQA, MQA); if a decoder takes one step, these become queries of that head, so that its keys are read once (on a CPU 2.4 times as
fast with one head for four, 1,024 keys). torch's kernel for CPUs needs a bias with all four dimensions.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.ops.bias import first_keys_bias
from dstrain.ops.kernels import DROPOUT_ATTENTION, PACKED_ALIBI_ATTENTION, PACKED_ATTENTION, TRAINING_ATTENTION
from dstrain.ops.packed_attention import PackedPair, from_rows, padded_rows, to_rows


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    mask_keys: Tensor | None = None,
) -> Tensor:
    """query: (B, H, T, K); key, value: (B, H or fewer, S, K); bias: broadcasts to (B, H, T, S) -> (B, H, T, K).

    causal: query t sees keys 0..t; not together with `bias`. A bias that requires a gradient gets it. mask_keys: (B, H, T), by
    which the dropout of the probabilities is counted (`random_bits.py`); None, and on a GPU, torch's generator draws.
    """
    if dropout > 0 and mask_keys is not None:
        kernel = DROPOUT_ATTENTION.choose(query.device, query.dtype)
        return kernel(query, key, value, bias=_four_dimensions(bias), causal=causal, dropout=dropout, mask_keys=mask_keys)
    grouped = key.shape[1] != query.shape[1]
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, bias))
    if needs_grad and not grouped and dropout == 0:
        kernel = TRAINING_ATTENTION.choose(query.device, query.dtype, size=query.shape[2] * key.shape[2])
        return kernel(query, key, value, _four_dimensions(bias), causal)
    folded = grouped and query.shape[2] == 1 and not causal
    if folded:
        query = query.squeeze(2).view(len(query), key.shape[1], -1, query.shape[3])  # (B, heads of keys, queries of each, K)
        if bias is not None and bias.ndim > 2 and bias.shape[-3] > 1:
            bias = bias.reshape(*bias.shape[:-3], key.shape[1], -1, bias.shape[-1])
    mixed = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_four_dimensions(bias),
        dropout_p=dropout,
        is_causal=causal,
        enable_gqa=grouped and not folded,
    )
    return mixed.flatten(1, 2).unsqueeze(2) if folded else mixed


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, pair: PackedPair, *, dropout: float = 0.0, mask_keys: Tensor | None = None
) -> Tensor:
    """The same of packed sequences. query: (H, N, K); key, value: (H or fewer, M, K) -> (H, N, K), any values at padding.

    mask_keys: (H, N).
    """
    op = PACKED_ATTENTION if pair.alibi is None else PACKED_ALIBI_ATTENTION
    kernel = op.choose(query.device, query.dtype) if dropout == 0 else padded_rows
    by_rows = None if mask_keys is None else to_rows(mask_keys.unsqueeze(-1), pair.queries.rows).squeeze(-1)  # (b, H, L)
    return kernel(query, key, value, pair, partial(attention, dropout=dropout, mask_keys=by_rows))


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """The same by its formula."""
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


def mean_probabilities(query: Tensor, key: Tensor, *, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """The probabilities of `attention`, averaged over the heads and before dropout.

    query: (B, H, T, K); key: (B, H or fewer, S, K) -> (B, T, S) float32, computed in it as kernels do inside. It costs
    a second product and H T S numbers per sentence.
    """
    if causal:
        bias = first_keys_bias(query, key)
    grouped = query.float().view(len(query), key.shape[1], -1, *query.shape[2:])  # (B, heads of keys, queries of each, T, K)
    scores = (grouped @ key.float().unsqueeze(2).transpose(-1, -2)).flatten(1, 2) / math.sqrt(query.shape[-1])  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1).mean(1)


def packed_mean_probabilities(query: Tensor, key: Tensor, pair: PackedPair) -> Tensor:
    """The same of packed sequences: (H, N, K), (H or fewer, M, K) -> (N, S), by the keys' positions, S those of the longest."""
    queries, keys = pair.queries.rows, pair.keys.rows
    mean = mean_probabilities(to_rows(query, queries), to_rows(key, keys), **pair.row_bias._asdict())  # (b, T, S)
    return from_rows(mean.unsqueeze(1), queries, query.shape[1])[0]


def _four_dimensions(bias: Tensor | None) -> Tensor | None:
    """(H, T, S) -> (1, H, T, S); others as they are."""
    return bias.unsqueeze(0) if bias is not None and bias.ndim == 3 else bias
