"""Triton's kernels beside the references of their ops in float64, of any size: `tests/triton/` calls them at toy size.

An error is the largest difference of an output or a gradient, as a share of the largest value there (of 1 if all are smaller).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dstrain.ops.activation import ACTIVATIONS, composed_gate
from dstrain.ops.divergence import Divergence
from dstrain.ops.dropout import CountedMask, counted_dropout
from dstrain.ops.kernels import (
    CROSS_ENTROPY,
    DENSE_DISTILLATION,
    DROPOUT,
    GATE,
    NORM,
    R_DROP,
    ROTATION,
    SPARSE_DISTILLATION,
    composed_norm,
)
from dstrain.ops.norm import NormWeights
from dstrain.ops.random_bits import derived_keys
from dstrain.ops.rotary import CosSin, apply_rotary, compute_cos_sin, inverse_frequencies
from dstrain.ops.teacher_signal import DenseSignal, SparseSignal
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy, reference_linear_cross_entropy
from dstrain.ops.token_loss.distillation import DistillationTerms, linear_distillation, reference_linear_distillation
from dstrain.ops.token_loss.r_drop import linear_r_drop, reference_linear_r_drop
from tests.gpu.checks import random

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""The largest errors: sums of many float32 values, and gradients of logits that are rounded to bfloat16."""


class KernelSize(NamedTuple):
    """tokens of `width` features, or of heads; loss_tokens over so many vocabulary entries."""

    tokens: int
    width: int
    heads: int
    head_dim: int
    loss_tokens: int
    entries: int


REAL = KernelSize(tokens=8_192, width=1_024, heads=16, head_dim=64, loss_tokens=1_024, entries=131_072)
TOY = KernelSize(tokens=5, width=24, heads=2, head_dim=8, loss_tokens=4, entries=37)

Check = Callable[[torch.device, torch.dtype, KernelSize], float]
"""The error of a kernel there."""


def error_of(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of all; infinite if something is not a number."""
    errors = []
    for ours, exact in zip(found, expected, strict=True):
        error = (ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1)
        errors.append(torch.where(error.isnan(), torch.inf, error))
    return float(torch.stack(errors).max())


def triton_kernel(op: Any, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """Of an op."""
    with op.forced("triton"):
        kernel: Callable[..., Any] = op.choose(device, op.dtype or dtype)
    assert kernel.module.startswith("dstrain.ops.triton.")  # type: ignore[attr-defined]
    return kernel


def layer_error(op: Any, reference: Callable[..., Tensor], inputs: Sequence[Tensor], call: Callable[..., Tensor]) -> float:
    """Of `call(function, inputs)` and of the gradients of all inputs."""
    device, dtype = inputs[0].device, inputs[0].dtype
    results = []
    for function, kind in ((triton_kernel(op, device, dtype), dtype), (reference, torch.float64)):
        own = [each.detach().to(kind).requires_grad_() for each in inputs]
        out = call(function, own)
        assert out.dtype == kind
        results.append([out.detach(), *torch.autograd.grad(out, own, random(device, *out.shape, dtype=dtype, seed=7).to(kind))])
    return error_of(*results)


def mask_of(size: KernelSize, device: torch.device) -> CountedMask:
    """Of (tokens, width)."""
    return CountedMask(0.3, derived_keys(torch.arange(size.tokens, device=device), 5))


def norm_error(device: torch.device, dtype: torch.dtype, size: KernelSize, *, centered: bool) -> float:
    """Of the sum with a residual, after dropout, and of its norm; LayerNorm has a bias."""
    mask = mask_of(size, device)
    inputs = [random(device, *shape, dtype=dtype, seed=seed) for seed, shape in enumerate(2 * [(size.tokens, size.width)])]
    inputs += [random(device, size.width, dtype=dtype, seed=seed) for seed in ((3, 4) if centered else (3,))]

    def call(function: Callable[..., Tensor], own: list[Tensor]) -> Tensor:
        norm = NormWeights(own[2], own[3] if centered else None, 1e-5, centered)
        return torch.cat(function(own[0], norm, own[1], mask), -1)

    return layer_error(NORM, composed_norm, inputs, call)


def dropout_error(device: torch.device, dtype: torch.dtype, size: KernelSize) -> float:
    """With a residual; infinite if a mask differs in one bit."""
    mask, shape = mask_of(size, device), (size.tokens, size.width)
    inputs = [random(device, *shape, dtype=dtype, seed=seed) for seed in (1, 2)]
    ones = torch.ones(shape, dtype=dtype, device=device)
    if not torch.equal(triton_kernel(DROPOUT, device, dtype)(ones, mask) == 0, counted_dropout(ones, mask) == 0):
        return torch.inf
    return layer_error(DROPOUT, counted_dropout, inputs, lambda function, own: function(own[0], mask, own[1]))


def rotary_error(device: torch.device, dtype: torch.dtype, size: KernelSize, *, layout: str) -> float:
    """Of packed heads, (H, N, K), views of what a projection returns."""
    positions = torch.arange(size.tokens, device=device) % max(2, size.tokens // 4)
    inv_freq = inverse_frequencies(size.head_dim, 10_000.0).to(device)
    cos, sin = (part.to(dtype) for part in compute_cos_sin(positions, inv_freq, 1.0, torch.float64))
    projected = random(device, size.tokens, size.heads, size.head_dim, dtype=dtype)

    def call(function: Callable[..., Tensor], own: list[Tensor]) -> Tensor:
        return function(own[0].transpose(0, 1), CosSin(cos.to(own[0].dtype), sin.to(own[0].dtype)), layout)

    return layer_error(ROTATION, apply_rotary, [projected], call)


def gate_error(device: torch.device, dtype: torch.dtype, size: KernelSize) -> float:
    """Of both halves of one tensor."""
    both = random(device, size.tokens, 2 * size.width, dtype=dtype)

    def call(function: Callable[..., Tensor], own: list[Tensor]) -> Tensor:
        up, gate = own[0].split(size.width, dim=-1)
        return function(gate, up, ACTIVATIONS["silu"])

    return layer_error(GATE, composed_gate, [both], call)


def student(device: torch.device, dtype: torch.dtype, size: KernelSize) -> list[Tensor]:
    """Features, weight and labels, among them the first and the last entry; logits some 8 apart."""
    rows = (size.loss_tokens, size.entries)
    tensors = [random(device, count, 64, dtype=dtype, seed=seed).requires_grad_() for seed, count in enumerate(rows)]
    labels = torch.arange(size.loss_tokens, device=device) * 7919 % size.entries
    labels[-1] = size.entries - 1
    return [*tensors, labels]


def loss_error(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: list[Tensor], signals: Sequence[Any]
) -> float:
    """Of all results, and of the gradients of features and weight, in two chunks. signals: the teacher's, twice, or none."""
    exact = [*(each.detach().double().requires_grad_() for each in inputs[:2]), inputs[2]]
    chunk_tokens, results = (len(inputs[2]) + 1) // 2, []
    with ExitStack() as stack:
        for op in (CROSS_ENTROPY, DENSE_DISTILLATION, SPARSE_DISTILLATION, R_DROP):
            triton_kernel(op, inputs[0].device, torch.float32)
            stack.enter_context(op.forced("triton"))
        pairs = ((function, inputs, signals[:1]), (reference, exact, signals[1:]))
        for each, own, signal in pairs:
            found = each(*own, *signal, chunk_tokens=chunk_tokens)
            results.append([*(value.detach() for value in found), *torch.autograd.grad(found[0], own[:2])])
    return error_of(*results)


def cross_entropy_error(device: torch.device, dtype: torch.dtype, size: KernelSize) -> float:
    """With label smoothing and weights of tokens."""
    options = {"label_smoothing": 0.1, "token_weights": torch.linspace(0.2, 1.7, size.loss_tokens, device=device)}
    functions = (partial(each, **options) for each in (linear_cross_entropy, reference_linear_cross_entropy))
    return loss_error(*functions, student(device, dtype, size), ())


def r_drop_error(device: torch.device, dtype: torch.dtype, size: KernelSize) -> float:
    """Of two passes that differ by a tenth, with label smoothing and weights of tokens."""
    features, *rest = student(device, dtype, size)
    noise = 0.1 * random(device, *features.shape, dtype=dtype, seed=9)
    passes = torch.stack([features.detach(), features.detach() + noise]).requires_grad_()
    weights = torch.linspace(0.2, 1.7, size.loss_tokens, device=device)
    options = {"alpha": 0.7, "label_smoothing": 0.1, "token_weights": weights}
    functions = (partial(each, **options) for each in (linear_r_drop, reference_linear_r_drop))
    return loss_error(*functions, [passes, *rest], ())


def distillation_error(
    device: torch.device, dtype: torch.dtype, size: KernelSize, *, divergence: Divergence, is_sparse: bool
) -> float:
    """From all probabilities of a teacher, or from its 4 most probable entries and their tail, for some of the tokens."""
    temperature = 2.0
    dense = DenseSignal(*([random(device, count, 64, seed=8)] for count in (size.loss_tokens, size.entries)))
    exact = DenseSignal([dense.features[0].double()], [dense.weights[0].double()])
    signals: list[Any] = [dense, exact]
    if is_sparse:
        probs, ids = (exact.features[0] @ exact.weights[0].T / temperature).softmax(1).topk(4)
        kept = SparseSignal(ids, probs.float(), (1 - probs.sum(1)).float())
        # The same numbers for the reference: a tail of 1e-7, subtracted again in other precision, is another tail.
        signals = [kept, SparseSignal(ids, kept.probs.double(), kept.tail.double())]
    terms = DistillationTerms(divergence, temperature, hard_weight=0.7, kd_weight=0.6, label_smoothing=0.1)
    options = {"terms": terms, "selected": (torch.arange(size.loss_tokens, device=device) % 3).sign().float()}
    functions = (partial(each, **options) for each in (linear_distillation, reference_linear_distillation))
    return loss_error(*functions, student(device, dtype, size), signals)


DIVERGENCES = {
    "forward_kl": Divergence("forward_kl"),
    "reverse_kl": Divergence("reverse_kl"),
    "total_variation": Divergence("total_variation"),
    "jensen_shannon": Divergence("jensen_shannon", 0.5),
    "skew_kl": Divergence("skew_kl", 0.3),
}
CHECKS: dict[str, dict[str, Check]] = {
    "norm": {"layer": partial(norm_error, centered=True), "rms": partial(norm_error, centered=False)},
    "dropout": {"residual": dropout_error},
    "rotary": {layout: partial(rotary_error, layout=layout) for layout in ("half_split", "interleaved")},
    "gate": {"silu": gate_error},
    "cross_entropy": {"smoothed": cross_entropy_error},
    "r_drop": {"smoothed": r_drop_error},
    "dense_distillation": {
        name: partial(distillation_error, divergence=divergence, is_sparse=False) for name, divergence in DIVERGENCES.items()
    },
    "sparse_distillation": {
        name: partial(distillation_error, divergence=divergence, is_sparse=True) for name, divergence in DIVERGENCES.items()
    },
}
"""Op -> case -> check, of every op with a kernel of Triton."""
CASES = [(op, case) for op, cases in CHECKS.items() for case in cases]
