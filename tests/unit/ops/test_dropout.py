"""Dropout: the distribution of torch's own, from bits that are given."""

import pytest
import torch

from dstrain.ops.dropout import dropout, dropout_add
from dstrain.ops.random_bits import derived_keys, random_bits

SIZE = (123, 4567)


def bits_of(x: torch.Tensor, seed: int = 7) -> torch.Tensor:
    """For x, (n, features)."""
    return random_bits(derived_keys(torch.arange(len(x)), seed), 0, x.shape[1])


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9, 0.001])
def test_share_and_scale(p: float) -> None:
    x = torch.full(SIZE, 2.0)
    y = dropout(x, p, bits_of(x))
    dropped = (y == 0).float().mean().item()
    count = x.numel()
    assert abs(dropped - p) < 4 * (p * (1 - p) / count) ** 0.5 + 1 / 131072
    assert y.mean().item() == pytest.approx(2.0, abs=4 * 2 * (p / (1 - p) / count) ** 0.5)
    kept = y[y != 0]
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert kept[0].item() == pytest.approx(2 / (1 - p), rel=2e-4)


def test_elements_drop_independently() -> None:
    x = torch.ones(1 << 10, 1 << 10)
    kept = ((dropout(x, 0.3, bits_of(x)) != 0).float() - 0.7).flatten()
    for lag in (1, 2, 3, 4, 8, 1 << 10):
        correlation = (kept[:-lag] * kept[lag:]).mean().item() / (0.3 * 0.7)
        assert abs(correlation) < 0.005, lag


def test_without_bits_it_is_torch_s() -> None:
    x, residual = torch.randn(9, 9), torch.randn(9, 9)
    torch.manual_seed(5)
    expected = torch.nn.functional.dropout(x, 0.4)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.4), expected)
    torch.manual_seed(5)
    assert torch.equal(dropout_add(residual, x, 0.4), residual + expected)


@pytest.mark.parametrize("size", [1, 3, 5, 123])
def test_any_size_and_layout(size: int) -> None:
    x = torch.randn(size, 7).t()
    bits = bits_of(x)
    assert torch.equal(dropout(x, 0.5, bits), dropout(x.contiguous(), 0.5, bits))
    assert torch.equal(dropout(x, 0.0, bits), x)


def test_gradient_flows_through_kept_elements_only() -> None:
    x = torch.randn(40, 40, requires_grad=True)
    residual = torch.randn(40, 40, requires_grad=True)
    y = dropout_add(residual, x, 0.3, bits_of(x))
    y.sum().backward()
    kept = (y - residual).detach() != 0
    assert torch.equal(residual.grad, torch.ones(40, 40))
    torch.testing.assert_close(x.grad, kept.float() / 0.7, rtol=2e-5, atol=0)


def test_added_to_the_residual() -> None:
    x, residual = torch.randn(9, 9), torch.randn(9, 9)
    bits = bits_of(x)
    torch.testing.assert_close(dropout_add(residual, x, 0.4, bits), residual + dropout(x, 0.4, bits))
    assert torch.equal(dropout_add(residual, x, 0.0, bits), residual + x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    x = torch.ones(10, 100, dtype=dtype)
    y = dropout(x, 0.5, bits_of(x))
    assert y.dtype == dtype
    assert set(y.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(y != 0, dropout(x.float(), 0.5, bits_of(x)) != 0)
