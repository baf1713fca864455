"""Vocabulary projection and a loss of its logits in one, without the logits of all tokens at once.

`chunked_loss` goes through the tokens in chunks. While a chunk's logits exist, a `TokenLoss` turns them into losses and, in their
place, into their gradient; the op at once accumulates the gradients of features and weight, so that backward only multiplies
them by the gradient of the loss. Memory: chunk_tokens x V in fp32, and the loss's own temporaries, instead of several times
N x V, plus the two gradients (N x E and V x E in fp32). The forward pass thus holds the work of the backward pass; if no gradient
is needed (evaluation, `torch.no_grad`) it makes no product for one.

A `TokenLoss` gets the logits of some tokens and nothing else: neither chunks nor dtypes, neither the weight nor how the
vocabulary is sliced. The terms of a loss that are linear in the sum of a token's logits cost no pass over them: the op provides
these sums (features times the sum of the weight's rows), and applies the constant `uniform_grad` to features and weight as an
outer product (rank one).

Precision: products run in the inputs' dtype (fp16 and bf16 on tensor cores); losses and the sum of the weight's gradient are fp32
(fp64 for fp64 inputs). Under `torch.autocast` both inputs are cast to its dtype, as `F.linear` does; the rest stays. In fp16 a
gradient is rounded before backward multiplies it by the loss scale, so values under 6e-8 are lost, most entries' if V is 100,000
and more: prefer bf16. A scale inside would have to fit into fp16 through a sum over all entries or tokens as well.

The weight is read in forward only and never kept: under ZeRO-3 it is whole only while the projection module runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.config_base import ChunkTokens
from dstrain.ops.chunk_size import resolve_chunk_tokens
from dstrain.ops.mixed_precision import accum_dtype, add_matmul, gradient_dtype, matmul_into, operand, to_autocast_dtype
from dstrain.ops.vocabulary import VocabularySlice


class PerToken(Protocol):
    """Something with an item for each token, such as a tensor of labels (N, ...)."""

    def __getitem__(self, tokens: slice, /) -> Self:
        """That of some tokens."""
        ...


TokenTargets = TypeVar("TokenTargets", bound=PerToken)
TokenTargets_contra = TypeVar("TokenTargets_contra", contravariant=True)


class TokenLosses(NamedTuple):
    """The losses of c tokens.

    loss: (c, 1). metrics: (c, 1) each, reported besides. logits_grad: of the shape of the logits, usually in their memory:
    the gradient of each token's loss plus `uniform_grad`. uniform_grad: subtracted from the gradient with respect to
    every logit. is_weighted: whether `logits_grad` has been multiplied by the tokens' weights; nothing else ever is.
    """

    loss: Tensor
    metrics: Sequence[Tensor]
    logits_grad: Tensor
    uniform_grad: float = 0.0
    is_weighted: bool = False


class TokenLoss(Protocol[TokenTargets_contra]):
    """A loss that is a sum over tokens. It reduces over the vocabulary only by the methods of a `VocabularySlice`."""

    @property
    def num_metrics(self) -> int:
        """How many metrics it returns."""
        ...

    def __call__(
        self,
        logits: Tensor,
        logit_sums: Tensor,
        targets: TokenTargets_contra,
        vocabulary: VocabularySlice,
        weights: Tensor | None,
        /,
    ) -> TokenLosses:
        """logits: (..., c, V), overwritten; logit_sums: (..., c, 1), their sums over the entries of this slice.

        weights: (c, 1) factors that it may multiply `logits_grad` by while it writes it, or leave to the op, which multiplies
        features; None if there are none.
        """
        ...


class ChunkedLoss(NamedTuple):
    """loss_sum: () with gradient to features and weight. metrics: (number of metrics, N) without."""

    loss_sum: Tensor
    metrics: Tensor


def chunked_loss(
    features: Tensor,
    weight: Tensor,
    loss: TokenLoss[TokenTargets],
    targets: TokenTargets,
    *,
    chunk_tokens: ChunkTokens,
    token_weights: Tensor | None = None,
    vocabulary: VocabularySlice | None = None,
) -> ChunkedLoss:
    """The sum of a loss over tokens, fp32 (fp64 for fp64 inputs).

    features: (N, E), or (P, N, E) for P passes over the same tokens; weight: (V, E), of the same dtype. chunk_tokens: tokens of
    all passes together whose logits exist at one time, auto = by device and vocabulary (`chunk_size.py`); it moves no result
    beyond rounding. token_weights: (N,) factors of the tokens' losses, without gradient; None = all are 1. vocabulary: which
    entries the rows of the weight are; None = all there are. The ranks of a sliced vocabulary hold the same
    features and get the same loss and the same gradient of the features.
    """
    features, weight = to_autocast_dtype(features), to_autocast_dtype(weight)
    with_grad, vocabulary = torch.is_grad_enabled(), VocabularySlice.whole(len(weight)) if vocabulary is None else vocabulary
    in_all_passes = resolve_chunk_tokens(chunk_tokens, features.device.type, vocabulary.largest_slice)
    plan = _Plan(
        chunk_tokens=max(1, in_all_passes // (features.shape[0] if features.ndim == 3 else 1)),
        token_weights=None if token_weights is None else token_weights.unsqueeze(1).to(accum_dtype(features.dtype)),
        vocabulary=vocabulary,
        needs_grad=(with_grad and features.requires_grad, with_grad and weight.requires_grad),
    )
    chunked_forward = partial(_chunked_forward, loss=loss, targets=targets, plan=plan)
    return ChunkedLoss(*_GradientsInForward.apply(features, weight, chunked_forward))  # type: ignore[no-untyped-call]


def logits_in_chunks(features: Tensor, weight: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """The tokens of each chunk and their logits, fp32 or wider. features: (..., N, E), weight: (V, E) -> (..., c, V)

    Every chunk has the same memory: logits that are needed after the chunk must be copied. The caller may
    overwrite them.
    """
    num_tokens = features.shape[-2]
    shape = (*features.shape[:-2], min(chunk_tokens, num_tokens), len(weight))
    buffer = features.new_empty(shape, dtype=accum_dtype(features.dtype))
    for start in range(0, num_tokens, chunk_tokens):
        tokens = slice(start, min(start + chunk_tokens, num_tokens))
        logits = buffer[..., : tokens.stop - start, :]
        for chunk, out in zip(_passes(features[..., tokens, :]), _passes(logits), strict=True):
            matmul_into(chunk, weight.t(), out=out)
        yield tokens, logits


def _passes(tensor: Tensor) -> list[Tensor]:
    """The matrices of a tensor with two or three dimensions."""
    return [tensor] if tensor.ndim == 2 else list(tensor.unbind(0))


class _Plan(NamedTuple):
    """token_weights: (N, 1). needs_grad: whether features and weight need a gradient."""

    chunk_tokens: int
    token_weights: Tensor | None
    vocabulary: VocabularySlice
    needs_grad: tuple[bool, bool]


class _Gradients:
    """The gradients of the loss sum with respect to features and weight, as far as needed, chunk by chunk."""

    def __init__(self, features: Tensor, weight: Tensor, plan: _Plan) -> None:
        accum = accum_dtype(features.dtype)
        self.weight = weight
        self.weight_sum = weight.sum(0, dtype=accum)  # (E,)
        self.of_features = torch.empty_like(features, dtype=accum) if plan.needs_grad[0] else None
        self.of_weight = torch.zeros_like(weight, dtype=accum) if plan.needs_grad[1] else None
        self._of_every_entry = torch.zeros_like(self.weight_sum)  # a term that all rows of the weight's gradient have

    def add(self, tokens: slice, chunk: Tensor, token_weights: Tensor | None, result: TokenLosses) -> None:
        """Those of one chunk. chunk: its features, (..., c, E)."""
        pending = None if result.is_weighted else token_weights
        if self.of_weight is not None and result.uniform_grad:
            weighted = chunk if token_weights is None else chunk * token_weights
            total = weighted.flatten(0, -2).sum(0, dtype=self.weight_sum.dtype)
            self._of_every_entry.add_(total, alpha=result.uniform_grad)
        inputs = _passes((chunk if pending is None else chunk * pending).to(chunk.dtype))
        for index, logits_grad in enumerate(_passes(result.logits_grad)):
            logits_grad = operand(logits_grad, chunk.dtype)
            if self.of_features is not None:
                matmul_into(logits_grad, self.weight, out=_passes(self.of_features)[index][tokens])
            if self.of_weight is not None:
                add_matmul(self.of_weight, logits_grad.t(), inputs[index])
        if self.of_features is not None:
            grad = self.of_features[..., tokens, :]
            if pending is not None:
                grad.mul_(pending)
            if result.uniform_grad:
                uniform = result.uniform_grad * self.weight_sum
                grad.sub_(uniform if token_weights is None else token_weights * uniform)

    def finished(self, vocabulary: VocabularySlice) -> tuple[Tensor | None, Tensor | None]:
        """Both, None if not needed."""
        if self.of_weight is not None:
            self.of_weight.sub_(self._of_every_entry)
        return None if self.of_features is None else vocabulary.add_ranks(self.of_features), self.of_weight


def _chunked_forward(
    features: Tensor, weight: Tensor, loss: TokenLoss[TokenTargets], targets: TokenTargets, plan: _Plan
) -> tuple[ChunkedLoss, tuple[Tensor | None, Tensor | None]]:
    """The sums and, as far as needed, the gradients of loss_sum with respect to features and weight."""
    accum, num_tokens = accum_dtype(features.dtype), features.shape[-2]
    losses = features.new_empty(num_tokens, 1, dtype=accum)
    metrics = features.new_empty(loss.num_metrics, num_tokens, 1, dtype=accum)
    gradients = _Gradients(features, weight, plan)
    for tokens, logits in logits_in_chunks(features, weight, plan.chunk_tokens):
        chunk, weights = features[..., tokens, :], None if plan.token_weights is None else plan.token_weights[tokens]
        logit_sums = (chunk.to(accum) @ gradients.weight_sum).unsqueeze(-1)
        # In float16 the gradient of a logit would underflow by a small weight; the features do not.
        for_loss = None if features.dtype == torch.float16 else weights
        result = loss(logits, logit_sums, targets[tokens], plan.vocabulary, for_loss)
        losses[tokens] = result.loss
        torch.stack(list(result.metrics), out=metrics[:, tokens])
        if any(plan.needs_grad):
            gradients.add(tokens, chunk, weights, result)
    loss_sum = (losses if plan.token_weights is None else losses * plan.token_weights).sum()
    return ChunkedLoss(loss_sum, metrics.squeeze(2)), gradients.finished(plan.vocabulary)


class _GradientsInForward(torch.autograd.Function):
    """Makes the gradients in forward and scales them in backward."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, chunked_forward: Callable[..., Any]) -> tuple[Tensor, ...]:
        with torch.autocast(features.device.type, enabled=False):
            sums, gradients = chunked_forward(features, weight)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = features.dtype, gradient_dtype(weight)
        ctx.mark_non_differentiable(sums.metrics)
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if gradient is None else (gradient * loss_grad).to(dtype) for gradient, dtype in gradients]
        return *scaled, None
