"""16-bit products with float32 sums: as exact as float32, and how near the gradients of the loss in bfloat16 come to float64."""

import pytest
import torch

from dstrain.ops import mixed_precision
from dstrain.ops.mixed_precision import add_matmul, has_fp32_output, matmul_into, operand
from tests.gpu.checks import bfloat16_gradient_errors


@pytest.fixture(params=["converted", "as they are"])
def bfloat16_units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU multiplies bfloat16: as if it did not, then as it is."""
    if request.param == "converted":
        monkeypatch.setattr(mixed_precision, "_cpu_multiplies_bfloat16", lambda: False)
    return mixed_precision._cpu_multiplies_bfloat16()


@pytest.mark.usefixtures("bfloat16_units")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 300), (300, 7)))
    exact = left.double() @ right.double()
    out = matmul_into(left, right, out=torch.empty(5, 7))
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-5)
    add_matmul(out, left, right)
    torch.testing.assert_close(out.double(), 2 * exact, rtol=1e-6, atol=2e-5)


def test_a_wide_operand_is_rounded_once(bfloat16_units: bool) -> None:
    """To bfloat16, by the product itself where the CPU has one; other products before and after are not rounded."""
    generator = torch.Generator().manual_seed(1)
    wide, right = torch.randn(64, 300, generator=generator), torch.randn(300, 48, generator=generator)
    left = operand(wide, torch.bfloat16)
    assert left.dtype == (torch.float32 if bfloat16_units else torch.bfloat16)
    expected = wide.bfloat16().double() @ right.bfloat16().double()
    out = matmul_into(left, right.bfloat16(), out=torch.empty(64, 48))
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=2e-5)
    add_matmul(out, left, right.bfloat16())
    torch.testing.assert_close(out.double(), 2 * expected, rtol=1e-6, atol=4e-5)
    torch.testing.assert_close((wide @ right).double(), wide.double() @ right.double(), rtol=1e-6, atol=2e-5)
    assert operand(wide, torch.float16).dtype == torch.float16


def test_a_gpu_is_asked_for_float32_results() -> None:
    """On the meta device, which has the same operators: what is passed is accepted, and nothing is converted before."""
    left, right = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((5, 300), (300, 7)))
    assert has_fp32_output("meta")
    assert not has_fp32_output("cpu")
    out = matmul_into(left, right, out=torch.empty(5, 7, device="meta"))
    assert (out.dtype, out.shape) == (torch.float32, (5, 7))
    add_matmul(out, left, right)


@pytest.mark.usefixtures("bfloat16_units")
def test_gradients_of_the_loss_in_bfloat16_are_near_those_in_float64() -> None:
    """With logits rounded to bfloat16 they are seven times as far."""
    loss, *gradients = bfloat16_gradient_errors(torch.device("cpu"), tokens=256, width=64, entries=2000, chunk_tokens=50)
    assert loss < 1e-6
    assert max(gradients) < 2e-3
