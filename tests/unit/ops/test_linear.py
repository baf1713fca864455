"""The linear map and its backward pass against torch's."""

import pytest
import torch
from torch.nn import functional as F

from dstrain.ops.linear import linear


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 7, 5), (0, 5)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_values_and_gradients_equal_torchs(shape: tuple[int, ...], biased: bool, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, (4, 5), (4,)))
    grads = []
    for function in (linear, F.linear):
        leaves = [tensor.clone().requires_grad_() for tensor in ((x, weight, bias) if biased else (x, weight))]
        if transposed and function is linear:
            leaves[1] = weight.t().clone().requires_grad_()
        product = linear(*leaves, transposed=transposed) if function is linear else F.linear(*leaves)
        found = list(torch.autograd.grad(product.sin().sum(), leaves))
        if transposed and function is linear:
            found[1] = found[1].t()
        grads.append((product, *found))
    for own, expected in zip(*grads, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 0, 1e-6), (None, 5e-4, 3e-3)])
@pytest.mark.parametrize("transposed", [True, False])
def test_gradients_of_bfloat16_weights_are_rounded_unless_they_may_be_float32(
    dtype: torch.dtype | None, least: float, most: float, transposed: bool
) -> None:
    """Of 300 rows, beside float64."""
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(size, generator=generator).bfloat16() for size in ((300, 40), (24, 40), (24,)))
    weight, bias = torch.nn.Parameter(weight.t() if transposed else weight), torch.nn.Parameter(bias)
    if dtype is not None:
        weight.grad_dtype = bias.grad_dtype = dtype
    output_grad = torch.randn(300, 24, generator=generator).bfloat16()
    linear(x, weight, bias, transposed=transposed).backward(output_grad)
    of_weight = output_grad.double().t() @ x.double()
    for parameter, exact in ((weight, of_weight.t() if transposed else of_weight), (bias, output_grad.double().sum(0))):
        assert parameter.grad is not None and parameter.grad.dtype == (dtype or torch.bfloat16)
        assert least <= float((parameter.grad.double() - exact).norm() / exact.norm()) < most


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5)
    linear(x, weight).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 5))


def test_a_transposed_input_and_gradient_are_read_as_they_are() -> None:
    x, weight = torch.randn(5, 3).t().requires_grad_(), torch.randn(4, 5, requires_grad=True)
    linear(x, weight).t().contiguous().square().sum().backward()
    expected = torch.autograd.grad(F.linear(x, weight).square().sum(), [x, weight])
    torch.testing.assert_close([x.grad, weight.grad], list(expected))


def test_the_parameter_itself_is_kept_for_the_backward_pass() -> None:
    """As under ZeRO-3, which frees a Parameter's data after the forward pass and gathers it again before the backward pass."""
    x, weight = torch.randn(3, 5, requires_grad=True), torch.nn.Parameter(torch.randn(4, 5))
    values = weight.detach().clone()
    product = linear(x, weight)
    weight.data = torch.empty(0)
    weight.data = 2 * values
    product.sum().backward()
    torch.testing.assert_close(x.grad, 2 * values.sum(0).expand(3, 5))


def test_autocast_decides_the_dtype() -> None:
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = linear(x, weight)
    assert product.dtype == torch.bfloat16
    product.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
