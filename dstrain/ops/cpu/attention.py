"""Attention of short sequences in training: all heads of all sentences as one batch of matrix products.

torch's fused kernel for CPUs multiplies one tiny matrix at a time; this takes three quarters of its time (13 words, K = 32; the
two meet at about 25 words). It keeps the probabilities, T x S numbers a head, so it is only for short sequences. In bfloat16 the
fused kernel takes 4 to 9 times the time of float32 products up to 48 words, and as long at 200.

With dropout of the probabilities torch keeps them too; `counted_dropout_attention` does so with masks that are counted.

In decoding a head has few queries, and `decoding_products` takes half the time of the fused kernel or less (5 beams of 32
sentences, 15 keys, K = 32: 0.11 ms against 0.27). Keys come in whole blocks: of fewer than 16 float32 numbers torch's softmax is
not vectorized and takes 7 times as long, and its products of fewer than 400 multiplications take 3 times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.ops.bias import first_keys_bias
from dstrain.ops.dropout import dropout as drop
from dstrain.ops.random_bits import random_bits

KEY_BLOCK = 16
"""Keys in decoding are padded to a multiple of this number."""


def decoding_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """query: (P, Q, K); key, value: (P, S, K), S a multiple of `KEY_BLOCK`; bias: broadcasts to (P, Q, S) -> (P, Q, K)"""
    # Cheaper than `baddbmm`, which copies the bias to the shape of the scores first.
    scores = torch.add(bias, torch.bmm(query, key.transpose(1, 2)), alpha=query.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), value)


def batched_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """query: (B, H, T, K); key, value: (B, H, S, K); bias: broadcasts to (B, H, T, S), not if `causal` -> (B, H, T, K)"""
    if causal:
        bias = first_keys_bias(query, key)
    product: Tensor = _BatchedAttention.apply(query, key, value, bias)  # type: ignore[no-untyped-call]
    return product


def counted_dropout_attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None, causal: bool, dropout: float, mask_keys: Tensor
) -> Tensor:
    """query: (B, H, T, K); key, value: (B, H or fewer, S, K); mask_keys: (B, H, T) -> (B, H, T, K). Computed in float32."""
    if causal:
        bias = first_keys_bias(query, key)
    repeats = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(repeats, dim=1).float() for heads in (key, value))
    scores = query.float() @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, H, T, S)
    probabilities = (scores if bias is None else scores + bias).softmax(-1)
    return (drop(probabilities, dropout, random_bits(mask_keys, 0, key.shape[2])) @ value).to(query.dtype)


class _BatchedAttention(torch.autograd.Function):
    """In float32 whatever the dtype, as kernels do inside."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        shape, ctx.dtype = query.shape, query.dtype
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        query, key, value = (heads.flatten(0, 1).float() for heads in (query, key, value))  # (B * H, T or S, K)
        scores = query.bmm(key.transpose(1, 2)).mul_(shape[-1] ** -0.5)
        if bias is not None:
            scores.view(*shape[:3], -1).add_(bias)
        probabilities = scores.softmax(-1)  # (B * H, T, S)
        ctx.save_for_backward(query, key, value, probabilities)
        return probabilities.bmm(value).view(shape).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        batch, heads = grad.shape[:2]
        query, key, value, probabilities = ctx.saved_tensors
        grad = grad.flatten(0, 1).float()
        value_grad = probabilities.transpose(1, 2).bmm(grad)
        scores_grad = grad.bmm(value.transpose(1, 2))
        scores_grad.sub_((scores_grad * probabilities).sum(-1, keepdim=True)).mul_(probabilities)  # (B * H, T, S)
        bias_grad = None
        if ctx.needs_input_grad[3]:  # a learned bias
            shape, dtype = ctx.bias
            # a copy: for a bias of full shape the sum is a view of the scores' gradient, which is scaled in place below
            bias_grad = scores_grad.view(batch, heads, *scores_grad.shape[1:]).sum_to_size(shape).to(dtype, copy=True)
        scores_grad.mul_(query.shape[-1] ** -0.5)
        query_grad, key_grad = scores_grad.bmm(key), scores_grad.transpose(1, 2).bmm(query)
        grads = (each.unflatten(0, (batch, heads)).to(ctx.dtype) for each in (query_grad, key_grad, value_grad))
        return *grads, bias_grad
