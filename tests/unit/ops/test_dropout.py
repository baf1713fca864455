"""Dropout: the distribution of torch's own, reproducible from torch's seed."""

import pytest
import torch

from dstrain.ops.dropout import dropout, dropout_add
from dstrain.ops.kernels import DROPOUT

SIZE = (123, 4567)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9, 0.001])
def test_share_and_scale(p: float) -> None:
    torch.manual_seed(7)
    x = torch.full(SIZE, 2.0)
    y = dropout(x, p)
    dropped = (y == 0).float().mean().item()
    count = x.numel()
    assert abs(dropped - p) < 4 * (p * (1 - p) / count) ** 0.5 + 1 / 131072
    assert y.mean().item() == pytest.approx(2.0, abs=4 * 2 * (p / (1 - p) / count) ** 0.5)
    kept = y[y != 0]
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert kept[0].item() == pytest.approx(2 / (1 - p), rel=2e-4)
    with DROPOUT.forced("torch"):
        reference = dropout(x, p)
    assert (reference == 0).float().mean().item() == pytest.approx(dropped, abs=0.005)


def test_elements_drop_independently() -> None:
    torch.manual_seed(7)
    kept = (dropout(torch.ones(1 << 20), 0.3) != 0).float() - 0.7
    for lag in (1, 2, 3, 4, 8):
        correlation = (kept[:-lag] * kept[lag:]).mean().item() / (0.3 * 0.7)
        assert abs(correlation) < 0.005, lag


@pytest.mark.parametrize("size", [1, 3, 5, 123])
def test_any_size_and_layout(size: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(size, 7).t()
    assert dropout(x, 0.5).shape == x.shape
    assert torch.equal(dropout(x, 0.0), x)


def test_seeded_by_torch() -> None:
    x = torch.randn(50, 50)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append((dropout(x, 0.3), dropout(x, 0.3)))
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert not torch.equal(draws[0][0], draws[0][1])


def test_gradient_flows_through_kept_elements_only() -> None:
    torch.manual_seed(3)
    x = torch.randn(40, 40, requires_grad=True)
    residual = torch.randn(40, 40, requires_grad=True)
    y = dropout_add(residual, x, 0.3)
    y.sum().backward()
    kept = (y - residual).detach() != 0
    assert torch.equal(residual.grad, torch.ones(40, 40))
    torch.testing.assert_close(x.grad, kept.float() / 0.7, rtol=2e-5, atol=0)


def test_added_to_the_residual() -> None:
    x, residual = torch.randn(9, 9), torch.randn(9, 9)
    torch.manual_seed(5)
    expected = residual + dropout(x, 0.4)
    torch.manual_seed(5)
    torch.testing.assert_close(dropout_add(residual, x, 0.4), expected)
    assert torch.equal(dropout_add(residual, x, 0.0), residual + x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    y = dropout(torch.ones(1000, dtype=dtype), 0.5)
    assert y.dtype == dtype
    assert set(y.tolist()) == {0.0, 2.0}
