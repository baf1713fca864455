"""Scaled dot-product attention: softmax(q k' / sqrt(K) + bias) v.

The fast version is torch's `scaled_dot_product_attention`, which picks the kernel; it takes strided views, so no input needs
to be copied into place. With fewer key than query heads, each key head serves a block of query heads (GQA, MQA); where a
decoder takes one step these become queries of that head, so that its keys are read once (on a CPU 2.4 times as fast with one
head for four, 1,024 keys). A bias gets all four dimensions, without which torch's kernel for the CPU does not take it.

Training on a CPU with sentences of a few words is the exception. There the kernel multiplies one tiny matrix at a time, and
the same by batched products, with a backward pass of its own, takes three quarters of the time (13 words, K = 32; the two meet
at about 25 words). It keeps the probabilities, T x S numbers a head, which is why it is for short sequences alone. The
kernel is much slower in bfloat16 (4 to 9 times the time of products of float32 up to 48 words, as long at 200), so these serve it
up to there.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dstrain.ops.bias import causal_bias

SHORT = {torch.float32: 400, torch.bfloat16: 40_000}
"""Up to so many scores (T x S) a head, training on a CPU goes by batched products; by the dtype of the query."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """query: (B, H, T, K); key, value: (B, H or fewer, S, K); bias: broadcasts to (B, H, T, S) -> (B, H, T, K).

    causal: query t sees keys 0..t; not together with `bias`. The bias gets no gradient.
    """
    grouped = key.shape[1] != query.shape[1]
    if dropout == 0 and not grouped and _short_training_on_cpu(query, key):
        if causal:
            bias = causal_bias(query.shape[2], key.shape[2], query.dtype, query.device)
        product: Tensor = _BatchedAttention.apply(query, key, value, bias)  # type: ignore[no-untyped-call]
        return product
    folded = grouped and query.shape[2] == 1 and not causal
    if folded:
        query = query.squeeze(2).view(len(query), key.shape[1], -1, query.shape[3])  # (B, heads of keys, queries of each, K)
        if bias is not None and bias.ndim > 2 and bias.shape[-3] > 1:
            bias = bias.reshape(*bias.shape[:-3], key.shape[1], -1, bias.shape[-1])
    if bias is not None and bias.ndim == 3:
        bias = bias.unsqueeze(0)
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=causal, enable_gqa=grouped and not folded
    )
    return mixed.flatten(1, 2).unsqueeze(2) if folded else mixed


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


def mean_probabilities(query: Tensor, key: Tensor, *, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """The probabilities by which `attention` mixes, which it never shows, averaged over the heads and before dropout.

    query: (B, H, T, K); key: (B, H or fewer, S, K) -> (B, T, S) float32, computed in it as kernels do inside. Costs a second
    product and H T S numbers a sentence.
    """
    if causal:
        bias = causal_bias(query.shape[2], key.shape[2], query.dtype, query.device)
    grouped = query.float().view(len(query), key.shape[1], -1, *query.shape[2:])  # (B, heads of keys, queries of each, T, K)
    scores = (grouped @ key.float().unsqueeze(2).transpose(-1, -2)).flatten(1, 2) / math.sqrt(query.shape[-1])  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1).mean(1)


def _short_training_on_cpu(query: Tensor, key: Tensor) -> bool:
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return learns and query.device.type == "cpu" and query.shape[2] * key.shape[2] <= SHORT.get(query.dtype, 0)


class _BatchedAttention(torch.autograd.Function):
    """All heads of all sentences as one batch of products, in float32 whatever the dtype, as kernels do inside."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        shape, ctx.dtype = query.shape, query.dtype
        query, key, value = (part.flatten(0, 1).float() for part in (query, key, value))  # (B * H, T or S, K)
        scores = query.bmm(key.transpose(1, 2)).mul_(shape[-1] ** -0.5)
        if bias is not None:
            scores.view(*shape[:3], -1).add_(bias)
        probabilities = scores.softmax(-1)  # (B * H, T, S)
        ctx.save_for_backward(query, key, value, probabilities)
        return probabilities.bmm(value).view(shape).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        batch, heads = gradient.shape[:2]
        query, key, value, probabilities = ctx.saved_tensors
        gradient = gradient.flatten(0, 1).float()
        of_value = probabilities.transpose(1, 2).bmm(gradient)
        of_scores = gradient.bmm(value.transpose(1, 2))
        of_scores.sub_((of_scores * probabilities).sum(-1, keepdim=True)).mul_(probabilities).mul_(query.shape[-1] ** -0.5)
        of_query, of_key = of_scores.bmm(key), of_scores.transpose(1, 2).bmm(query)
        of_query, of_key, of_value = (part.unflatten(0, (batch, heads)).to(ctx.dtype) for part in (of_query, of_key, of_value))
        return of_query, of_key, of_value, None
