"""Liger's fused linear cross-entropy, as an independent implementation of ours."""

from __future__ import annotations

import pytest
import torch

from dstrain.ops.kernels import CROSS_ENTROPY
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy

ROWS, WIDTH, ENTRIES = 5, 4, 37


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_liger_computes_the_same_loss(kernel: str, label_smoothing: float) -> None:
    """It smooths over V entries, we over the V - 1 others: its smoothing is ours times V / (V - 1)."""
    liger = pytest.importorskip("liger_kernel.transformers.functional")
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(ENTRIES, WIDTH, generator=generator).requires_grad_()
    labels = torch.randint(ENTRIES, (ROWS,), generator=generator)
    smoothing = label_smoothing * ENTRIES / (ENTRIES - 1)
    theirs = liger.liger_fused_linear_cross_entropy(features, weight, labels, label_smoothing=smoothing, reduction="sum")
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    with CROSS_ENTROPY.forced(kernel):
        ours, _ = linear_cross_entropy(features, weight, labels, label_smoothing=label_smoothing, chunk_tokens=3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(each, (features, weight)) for each in (ours, theirs))
    for our_grad, their_grad in zip(*grads, strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-5)
