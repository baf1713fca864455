"""Triton's kernels of a layer against the composed ones in float64, by the interpreter: values, gradients, all dtypes, masks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.data.batching.collate import PackedSize
from dstrain.models.config import DecoderStackConfig, LayerNormConfig, RmsNormConfig, StackConfig
from dstrain.models.position_config import RotaryPosition
from dstrain.nn.dropout import seed_masks
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.train_module import TrainModule
from dstrain.ops.activation import ACTIVATIONS, composed_gate
from dstrain.ops.dropout import CountedMask, counted_dropout
from dstrain.ops.kernels import DROPOUT, GATE, NORM, OPS, ROTATION, composed_norm
from dstrain.ops.norm import NormedSum, NormWeights
from dstrain.ops.random_bits import derived_keys
from dstrain.ops.rotary import CosSin, apply_rotary, compute_cos_sin, inverse_frequencies
from tests.batches import collate
from tests.unit.models.build import small_config, small_model

CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of the largest value. Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds."""
SHAPES = [(5, 123), (1, 1), (2, 3, 16), (0, 7)]
CPU = torch.device("cpu")


def triton(op: Any) -> Callable[..., Any]:
    with op.forced("triton"):
        function = op.choose(CPU, torch.float32)
    assert function.module.startswith("dstrain.ops.triton.")
    return function


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(
    kernel: Callable[..., Any], reference: Callable[..., Any], inputs: list[Tensor | None], call: Callable[..., Any]
) -> None:
    """`call(function, inputs)`: the output and the gradients of all inputs equal those of the reference in float64."""
    dtype = next(each.dtype for each in inputs if each is not None)
    results = []
    for function, kind in ((kernel, dtype), (reference, torch.float64)):
        own = [None if each is None else each.detach().to(kind).requires_grad_() for each in inputs]
        out = call(function, own)
        assert out.dtype == kind
        grads = torch.autograd.grad(out, [each for each in own if each is not None], random(*out.shape, seed=7).to(kind))
        results.append([out.detach(), *grads])
    for ours, expected in zip(*results, strict=True):
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(ours.double(), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype] * max(scale, 1.0))


def mask_for(x: Tensor, p: float = 0.3, start: int = 0) -> CountedMask:
    keys = derived_keys(torch.arange(x.numel() // x.shape[-1]).view(x.shape[:-1]), 5)
    return CountedMask(p, keys, start)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centered", [True, False])
def test_norm(shape: tuple[int, ...], centered: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs in the backward pass, so that some have several rows. RMSNorm has no bias, a LayerNorm may have none."""
    kernel, width = triton(NORM), shape[-1]
    x, residual = random(*shape, dtype=dtype).add_(0.5), random(*shape, dtype=dtype, seed=2)
    kernel(x, NormWeights(torch.ones(width), None, 1e-5, centered))  # imports the module
    monkeypatch.setattr("dstrain.ops.triton.norm.BACKWARD_PROGRAMS", 3)
    weight, bias = random(width, dtype=dtype, seed=3), random(width, dtype=dtype, seed=4) if centered else None
    mask = mask_for(x)

    def run(function: Callable[..., NormedSum], own: list[Any], dropped: CountedMask | None) -> NormedSum:
        return function(own[0], NormWeights(own[2], own[3], 1e-5, centered), own[1], dropped)

    check(kernel, composed_norm, [x, None, weight, bias], lambda function, own: run(function, own, None).normed)
    check(kernel, composed_norm, [x, residual, weight, bias], lambda function, own: run(function, own, mask).normed)
    # A pre-norm layer uses both: here as one tensor, so that the sum has a gradient of its own.
    check(kernel, composed_norm, [x, residual, weight, bias], lambda function, own: torch.cat(run(function, own, mask), -1))
    check(kernel, composed_norm, [x, residual, weight, None], lambda function, own: torch.cat(run(function, own, None), -1))


def test_a_sum_whose_norm_is_not_used() -> None:
    x, residual, weight = (random(3, 8, seed=seed).requires_grad_() for seed in (1, 2, 3))
    norm = NormWeights(weight[0], None, 1e-5, False)
    total, grad = triton(NORM)(x, norm, residual, mask_for(x)).total, random(3, 8, seed=4)
    expected = composed_norm(x, norm, residual, mask_for(x)).total
    torch.testing.assert_close(total, expected)
    for ours, theirs in zip(*(torch.autograd.grad(each, (x, residual), grad) for each in (total, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_norm_of_a_part_of_a_wider_tensor() -> None:
    wide, weight = random(7, 40), random(16, seed=3)
    norm = NormWeights(weight, None, 1e-6, False)
    for x in (wide[:, 5:21], wide.view(7, 40)[::2, :16], random(16, 7).t()):
        found, expected = triton(NORM)(x, norm), composed_norm(x, norm)
        assert found.total is x
        torch.testing.assert_close(found.normed, expected.normed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("start", [0, 5, 64])
def test_dropout_has_the_mask_of_the_reference_to_the_bit(
    start: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """start: of a tensor rank's part of the features; 5 begins inside of a word."""
    kernel, x = triton(DROPOUT), random(2, 3, 75, dtype=dtype).abs().add_(1)
    kernel(x, mask_for(x))
    monkeypatch.setattr("dstrain.ops.triton.launch.LARGEST_BLOCK", 32)
    mask, residual = mask_for(x, start=start), random(2, 3, 75, dtype=dtype, seed=2)
    dropped, expected = kernel(x, mask) == 0, counted_dropout(x, mask) == 0
    assert torch.equal(dropped, expected)
    assert 0.15 < float(dropped.float().mean()) < 0.45
    check(kernel, counted_dropout, [x, residual], lambda function, own: function(own[0], mask, own[1]))
    check(kernel, counted_dropout, [x], lambda function, own: function(own[0], mask))
    part = kernel(x[..., :10].contiguous(), mask) == 0
    assert torch.equal(part, expected[..., :10])


def test_dropout_of_nothing() -> None:
    x = random(3, 8)
    for residual in (None, random(3, 8, seed=2)):
        assert torch.equal(triton(DROPOUT)(x, mask_for(x, p=0.0), residual), counted_dropout(x, mask_for(x, p=0.0), residual))
    assert triton(DROPOUT)(random(0, 8), mask_for(random(0, 8))).shape == (0, 8)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
@pytest.mark.parametrize("rotated", [12, 4])
def test_rotary(rotated: int, layout: str, dtype: torch.dtype) -> None:
    """Rows, (B, H, T, K), packed, (H, N, K), as views of what a projection returns; angles the same for all rows, or not."""
    kernel, inv_freq = triton(ROTATION), inverse_frequencies(rotated, 100.0)
    rows = random(2, 5, 3 * 12, dtype=dtype).view(2, 5, 3, 12).transpose(1, 2)
    packed = random(5, 3 * 12, dtype=dtype).view(5, 3, 12).transpose(0, 1)
    cases = [
        (rows, torch.arange(5)),
        (rows, torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])),
        (packed, torch.tensor([[0, 1, 0, 1, 2]])),
    ]
    for x, positions in cases:
        angles = compute_cos_sin(positions, inv_freq, 1.25, torch.float64)
        cos, sin = (part.squeeze(0) if x.ndim == 3 else part for part in angles)

        def call(function: Callable[..., Tensor], own: list[Tensor], cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            # leaves are contiguous; the view of a projection's output is made again
            x = own[0].transpose(-2, -3).contiguous().transpose(-2, -3)
            return function(x, CosSin(cos.to(x.dtype), sin.to(x.dtype)), layout)

        check(kernel, apply_rotary, [x], call)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gate(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves are views of one tensor, with three blocks a row."""
    kernel, activation = triton(GATE), ACTIVATIONS[name]
    kernel(random(1, 2), random(1, 2), activation)
    monkeypatch.setattr("dstrain.ops.triton.launch.LARGEST_BLOCK", 16)
    both = random(2, 3, 74, dtype=dtype).mul_(2)

    def call(function: Callable[..., Tensor], own: list[Tensor]) -> Tensor:
        up, gate = own[0].split(37, dim=-1)
        return function(gate, up, activation)

    check(kernel, composed_gate, [both], call)


def test_an_activation_that_the_kernel_does_not_know_is_composed() -> None:
    gate, up = random(3, 4), random(3, 4, seed=2)
    assert torch.equal(triton(GATE)(gate, up, F.softplus), F.softplus(gate) * up)


def test_results_are_the_same_every_time() -> None:
    x, weight = random(9, 33).requires_grad_(), random(33, seed=3).requires_grad_()
    norm = NormWeights(weight, None, 1e-6, False)
    first, second = (torch.autograd.grad(triton(NORM)(x, norm).normed.square().sum(), (x, weight)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("norm_order", "norm"), [("pre", RmsNormConfig()), ("post", LayerNormConfig())])
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_computes_the_same_with_all_of_them(norm_order: str, norm: Any, packed: bool) -> None:
    """Loss and gradients of a gated model with rotary positions and counted dropout."""
    stack = {"depth": 1, "num_heads": 2, "ffn_dim": 6, "feed_forward": "gated"}
    config = small_config(
        model_dim=8,
        encoder=StackConfig(**stack),
        decoder=DecoderStackConfig(**stack),
        norm_order=norm_order,
        norm=norm,
        position=RotaryPosition(),
        activation="silu",
    )
    module = TrainModule(small_model(config).train(), CrossEntropy(CrossEntropyConfig(label_smoothing=0.1)))
    batch = collate([([5, 6, 7, 2], [8, 9, 2]), ([10, 2], [11, 12, 13, 14, 2])], packed=PackedSize() if packed else None)
    results = []
    for names in ((), [name for name, op in OPS.items() if "triton" in {kernel.name for kernel in op.kernels}]):
        seed_masks(1, step=1)
        with ExitStack() as stack_of_ops:
            for name in names:
                stack_of_ops.enter_context(OPS[name].forced("triton"))
            loss = module(batch).loss_sum
        results.append([loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
