"""Attention against its written-out form."""

import pytest
import torch
from torch import Tensor

from dstrain.ops.attention import attention, attention_reference
from dstrain.ops.bias import causal_bias, padding_bias
from dstrain.ops.kernels import TRAINING_ATTENTION, kernel_names
from tests.kernels import kernels_here

SHAPES = [
    (2, 4, 4, 5, 5, 8),
    (3, 6, 2, 1, 7, 16),
    (1, 4, 1, 9, 9, 4),
    (2, 2, 2, 123, 5, 3),
    (2, 3, 3, 21, 21, 5),
    (3, 2, 2, 2, 20, 8),
]
"""B, H, key heads, T, S, K; on both sides of the limit for batched products."""


def skip_unless_it_runs(kernel: str) -> None:
    if (problem := TRAINING_ATTENTION.problem(kernel, "cpu", torch.float32)) is not None:
        pytest.skip(problem)


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, key_heads, queries, keys, dim = shape
    generator = torch.Generator().manual_seed(1)
    sizes = ((heads, queries), (key_heads, keys), (key_heads, keys))
    query, key, value = (
        torch.randn(batch, length, count, dim, generator=generator).transpose(1, 2).requires_grad_() for count, length in sizes
    )
    return query, key, value


CASES = [
    (shape, masking)
    for shape in SHAPES
    for masking in ("none", "padding", "causal bias", "causal flag")
    if masking in {"none", "padding"} or shape[3] == shape[4] or (masking == "causal bias" and shape[3] < shape[4])
]


@pytest.mark.parametrize("kernel", kernel_names("training_attention"))
@pytest.mark.parametrize(("shape", "masking"), CASES)
def test_values_and_gradients(shape: tuple[int, ...], masking: str, kernel: str) -> None:
    skip_unless_it_runs(kernel)
    batch, _, _, queries, keys, _ = shape
    bias = None
    if masking == "padding":
        bias = padding_bias(torch.tensor([keys, max(keys // 2, 1), 1][:batch]), keys, torch.float32)
    if masking == "causal bias":
        bias = causal_bias(queries, keys, torch.float32, torch.device("cpu"))
    causal = masking == "causal flag"
    results = []
    for function in (attention, attention_reference):
        parts = inputs(shape)
        with TRAINING_ATTENTION.forced(kernel):
            mixed = function(*parts, bias=bias, causal=causal)
        mixed.square().sum().backward()
        results.append([mixed, *(part.grad for part in parts)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 4, 5, 5, 8), (2, 3, 3, 123, 123, 5)])
def test_bfloat16_rounds_results_only(shape: tuple[int, ...]) -> None:
    """Values and gradients are those of float32 on the same numbers, each rounded once."""
    exact = [part.detach().bfloat16().float().requires_grad_() for part in inputs(shape)]
    rounded = [part.detach().bfloat16().requires_grad_() for part in exact]
    results = []
    for parts in (rounded, exact):
        mixed = attention(*parts, causal=True)
        mixed.sum().backward()
        results.append([part.float() for part in (mixed, *(part.grad for part in parts)) if part is not None])
    torch.testing.assert_close(*results, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("heads_of_bias", [1, 6])
def test_one_step_with_grouped_heads_and_a_bias_of_each_head_or_of_all(heads_of_bias: int) -> None:
    query, key, value = inputs((3, 6, 2, 1, 7, 16))
    bias = torch.randn(3, heads_of_bias, 1, 7, generator=torch.Generator().manual_seed(2))
    for own in (bias, bias[0]):
        expected = attention_reference(query, key, value, bias=own)
        torch.testing.assert_close(attention(query, key, value, bias=own), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [3, 30])
def test_a_row_that_sees_nothing_is_finite_in_values_and_gradients(length: int) -> None:
    query, key, value = inputs((2, 2, 2, length, length, 4))
    mixed = attention(query, key, value, bias=padding_bias(torch.tensor([0, 3]), length, torch.float32))
    mixed.sum().backward()
    assert all(torch.isfinite(tensor).all() for tensor in (mixed, query.grad, key.grad, value.grad))


def test_training_and_evaluation_agree() -> None:
    """They may take different ways."""
    query, key, value = inputs((2, 4, 4, 7, 7, 8))
    with torch.no_grad():
        expected = attention(query, key, value, causal=True)
    torch.testing.assert_close(attention(query, key, value, causal=True), expected, rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(1)
    query, key = torch.zeros(1, 1, 400, 4), torch.zeros(1, 1, 100, 4)
    mixed = attention(query, key, torch.ones(1, 1, 100, 4), dropout=0.3)
    assert mixed.mean().item() == pytest.approx(1.0, abs=0.01)
    assert mixed.std().item() > 0.01


@pytest.mark.parametrize("kernel", kernel_names("training_attention"))
@pytest.mark.parametrize("heads_of_bias", [None, 1, 4])
@pytest.mark.parametrize("length", [3, 30])
def test_a_learned_bias_gets_its_gradient_from_every_kernel(kernel: str, heads_of_bias: int | None, length: int) -> None:
    """Of all rows, of each head, or of each row and head; below and above the length at which the table changes its choice."""
    skip_unless_it_runs(kernel)
    results = []
    for function in (attention, attention_reference):
        parts = inputs((2, 4, 4, length, length, 8))
        shape = (length, length) if heads_of_bias is None else (heads_of_bias, length, length)
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with TRAINING_ATTENTION.forced(kernel):
            mixed = function(*parts, bias=bias)
        mixed.square().sum().backward()
        results.append([mixed, bias.grad, *(part.grad for part in parts)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_bias_may_be_all_that_learns() -> None:
    query, key, value = (part.detach() for part in inputs((2, 4, 4, 5, 5, 8)))
    bias = torch.zeros(4, 5, 5, requires_grad=True)
    attention(query, key, value, bias=bias).square().sum().backward()
    assert bias.grad.abs().sum() > 0


@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (3, 3), (30, 30)], ids=["one step", "short", "long"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_a_learned_bias_gets_its_gradient_with_grouped_heads_and_masks(
    queries: int, keys: int, key_heads: int, masked: bool
) -> None:
    """One step folds grouped heads into queries; the mask is added to the bias, as a stack's context does."""
    mask = padding_bias(torch.tensor([keys, keys - 2]), keys, torch.float32) if masked else torch.zeros(())
    results = []
    for function in (attention, attention_reference):
        parts = inputs((2, 4, key_heads, queries, keys, 8))
        bias = torch.randn(4, queries, keys, generator=torch.Generator().manual_seed(3)).requires_grad_()
        mixed = function(*parts, bias=bias + mask)
        mixed.square().sum().backward()
        results.append([mixed, bias.grad, *(part.grad for part in parts)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("length", [3, 30])
def test_a_learned_bias_gets_its_gradient_under_dropout(key_heads: int, length: int) -> None:
    parts = inputs((2, 4, key_heads, length, length, 8))
    bias = torch.zeros(4, length, length, requires_grad=True)
    torch.manual_seed(1)
    attention(*parts, bias=bias, dropout=0.3).square().sum().backward()
    assert bias.grad is not None
    assert (bias.grad.abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize(("queries", "keys"), [(3, 7), (7, 3), (5, 5)])
@pytest.mark.parametrize("name", kernels_here("training_attention"))
def test_query_t_sees_keys_up_to_t(name: str, queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 2, queries, 8, generator=generator, requires_grad=True)
    key, value = torch.randn(2, 2, 2, keys, 8, generator=generator)
    with TRAINING_ATTENTION.forced(name):
        found = attention(query, key, value, causal=True)
    torch.testing.assert_close(found, attention_reference(query, key, value, causal=True), rtol=1e-5, atol=1e-6)
