"""Liger: its fused linear cross-entropy as an independent implementation of ours, and its kernels that the table offers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from dstrain.ops.kernels import CROSS_ENTROPY, NORM, composed_norm
from dstrain.ops.norm import NormWeights
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy, reference_linear_cross_entropy

ROWS, WIDTH, ENTRIES = 5, 4, 37
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def liger() -> Any:
    return pytest.importorskip("liger_kernel.transformers.functional")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(ENTRIES, WIDTH, generator=generator).requires_grad_()
    return features, weight, torch.randint(ENTRIES, (ROWS,), generator=generator)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_liger_computes_the_same_loss(kernel: str, label_smoothing: float, liger: Any) -> None:
    """It smooths over V entries, we over the V - 1 others: its smoothing is ours times V / (V - 1)."""
    features, weight, labels = inputs()
    smoothing = label_smoothing * ENTRIES / (ENTRIES - 1)
    theirs = liger.liger_fused_linear_cross_entropy(features, weight, labels, label_smoothing=smoothing, reduction="sum")
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    with CROSS_ENTROPY.forced(kernel):
        ours, _ = linear_cross_entropy(features, weight, labels, label_smoothing=label_smoothing, chunk_tokens=3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(each, (features, weight)) for each in (ours, theirs))
    for our_grad, their_grad in zip(*grads, strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_its_cross_entropy_as_our_kernel(label_smoothing: float) -> None:
    """The likelihoods, which it does not return, and the weights of tokens included."""
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "token_weights": torch.linspace(0.2, 1.7, ROWS)}
    features, weight, labels = inputs()
    with CROSS_ENTROPY.forced("liger"):
        assert CROSS_ENTROPY.choose(CPU, torch.float32).module == "dstrain.ops.liger"  # type: ignore[attr-defined]
        loss, nll = linear_cross_entropy(features, weight, labels, chunk_tokens=3, **options)
        grads = torch.autograd.grad(loss, (features, weight))
    exact = [each.detach().double().requires_grad_() for each in (features, weight)]
    expected_loss, expected_nll = reference_linear_cross_entropy(*exact, labels, chunk_tokens=3, **options)
    expected_grads = torch.autograd.grad(expected_loss, exact)
    for ours, theirs in zip((loss, nll, *grads), (expected_loss, expected_nll, *expected_grads), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def kernels_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernel gets a number as a tensor, and Liger converts it; the interpreter would hand it over as Python's."""
    convert = triton.runtime.interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(torch.tensor([argument]).numpy(), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr("triton.runtime.interpreter._implicit_cvt", converted)
    for module in ("layer_norm", "rms_norm"):  # the interpreter has no library of a device either
        monkeypatch.setattr(f"liger_kernel.ops.{module}.rsqrt", lambda x: 1 / tl.sqrt(x))


@pytest.mark.usefixtures("kernels_as_on_a_gpu")
@pytest.mark.parametrize("kind", ["layer", "layer without bias", "rms"])
@pytest.mark.parametrize("rows", [3, 0])
def test_its_norms_as_our_kernel(kind: str, rows: int) -> None:
    """Sum and norm, with gradients from both."""
    generator = torch.Generator().manual_seed(1)
    x, residual, vectors = (torch.randn(size, 12, generator=generator).requires_grad_() for size in (rows, rows, 2))
    grad = torch.randn(rows, 24, generator=generator)
    norm = NormWeights(vectors[0], vectors[1] if kind == "layer" else None, 1e-5, kind != "rms")
    results = []
    with NORM.forced("liger"):
        kernels = (NORM.choose(CPU, torch.float32), composed_norm)
    for kernel in kernels:
        out = torch.cat(kernel(x, norm, residual, None), -1)
        results.append([out, *torch.autograd.grad(out, (x, residual, vectors), grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
