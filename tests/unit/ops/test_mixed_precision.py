"""16-bit products with float32 sums: as exact as float32, and how near the gradients of the loss in bfloat16 come to float64."""

import pytest
import torch

from dstrain.ops.mixed_precision import add_matmul, has_fp32_output, matmul_into
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy, reference_linear_cross_entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 300), (300, 7)))
    exact = left.double() @ right.double()
    out = matmul_into(left, right, out=torch.empty(5, 7))
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-5)
    add_matmul(out, left, right)
    torch.testing.assert_close(out.double(), 2 * exact, rtol=1e-6, atol=2e-5)


def test_a_gpu_is_asked_for_float32_results() -> None:
    """On the meta device, which has the same operators: what is passed is accepted, and nothing is converted before."""
    left, right = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((5, 300), (300, 7)))
    assert has_fp32_output("meta")
    assert not has_fp32_output("cpu")
    out = matmul_into(left, right, out=torch.empty(5, 7, device="meta"))
    assert (out.dtype, out.shape) == (torch.float32, (5, 7))
    add_matmul(out, left, right)


def test_gradients_of_the_loss_in_bfloat16_are_near_those_in_float64() -> None:
    """Logits of a trained model, some 8 apart; errors by the norm, before autograd rounds gradients to the dtype of their inputs.

    With logits rounded to bfloat16 they are seven times as large.
    """
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(256, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(2000, 64, generator=generator).bfloat16().requires_grad_()
    labels = (features @ weight.T).float().add(torch.randn(256, 2000, generator=generator) * 4).argmax(1)
    options = {"label_smoothing": 0.1, "chunk_tokens": 50}
    loss, _ = linear_cross_entropy(features, weight, labels, **options)
    exact_inputs = [each.detach().double().requires_grad_() for each in (features, weight)]
    exact, _ = reference_linear_cross_entropy(*exact_inputs, labels, **options)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for ours, expected in zip(loss.grad_fn.saved_tensors, torch.autograd.grad(exact, exact_inputs), strict=True):
        assert ours.dtype == torch.float32
        assert float((ours.double() - expected).norm() / expected.norm()) < 2e-3
