"""Two passes in chunks against all logits and autograd, finite differences, torch's own losses and the memory promise."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dstrain.ops.token_loss.cross_entropy import reference_linear_cross_entropy
from dstrain.ops.token_loss.r_drop import linear_r_drop, reference_linear_r_drop


def case(num_rows: int, width: int, vocab_size: int, dtype: torch.dtype = torch.float32, apart: float = 0.3):
    """Features of two passes, `apart` from each other; weights between 0 and 1."""
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    first = torch.randn(num_rows, width, generator=generator)
    second = first + apart * torch.randn(num_rows, width, generator=generator)
    features = torch.stack([first, second]).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    return features, weight, labels, torch.rand(num_rows, generator=generator)


def outcome(function, features: Tensor, weight: Tensor, labels: Tensor, **options) -> list[Tensor]:
    sums = function(features, weight, labels, **options)
    return [*(value.detach() for value in sums), *torch.autograd.grad(0.37 * sums.loss, (features, weight))]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("alpha", "label_smoothing"), [(0.0, 0.1), (1.0, 0.0), (5.0, 0.1)])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 123, 4096])
@pytest.mark.parametrize("shape", [(123, 16, 77), (5, 3, 2), (1, 1, 5)])
def test_equals_the_reference(shape, chunk_tokens, alpha, label_smoothing, weighted) -> None:
    *inputs, token_weights = case(*shape)
    options = {"alpha": alpha, "label_smoothing": label_smoothing, "chunk_tokens": chunk_tokens}
    options["token_weights"] = token_weights if weighted else None
    expected = outcome(reference_linear_r_drop, *inputs, **options)
    torch.testing.assert_close(outcome(linear_r_drop, *inputs, **options), expected, rtol=1e-5, atol=1e-5)


def test_equals_the_reference_to_the_last_digits_in_double() -> None:
    *inputs, token_weights = case(123, 16, 77, dtype=torch.float64)
    options = {"alpha": 2.5, "label_smoothing": 0.1, "chunk_tokens": 50, "token_weights": token_weights.double()}
    expected = outcome(reference_linear_r_drop, *inputs, **options)
    torch.testing.assert_close(outcome(linear_r_drop, *inputs, **options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [linear_r_drop, reference_linear_r_drop])
def test_is_half_of_the_papers_formula(function) -> None:
    """Liang et al. 2021, equations 1 to 4, token by token in plain probabilities."""
    features, weight, labels, _ = case(23, 6, 11, dtype=torch.float64)
    weight = weight.detach()
    loss = nll = kl = 0.0
    for row in range(len(labels)):
        p, q = (torch.exp(h @ weight.T) / torch.exp(h @ weight.T).sum() for h in features[:, row].detach())
        divergence = ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
        likelihood = -(p[labels[row]].log() + q[labels[row]].log())
        loss += float(likelihood + 1.5 * divergence) / 2
        nll += float(likelihood) / 2
        kl += float(divergence)
    sums = function(features, weight, labels, alpha=1.5, label_smoothing=0.0, chunk_tokens=7)
    assert [value.sum().item() for value in sums] == pytest.approx([loss, nll, kl], rel=1e-12)


def test_without_alpha_it_is_the_mean_of_two_cross_entropies() -> None:
    features, weight, labels, token_weights = case(31, 8, 19, dtype=torch.float64)
    options = {"label_smoothing": 0.2, "chunk_tokens": 9, "token_weights": token_weights.double()}
    sums = linear_r_drop(features, weight, labels, alpha=0.0, **options)
    passes = [reference_linear_cross_entropy(half, weight, labels, **options) for half in features]
    torch.testing.assert_close(sums.loss, (passes[0][0] + passes[1][0]) / 2)
    torch.testing.assert_close(sums.nll, (passes[0][1] + passes[1][1]) / 2)


def test_equal_passes_have_a_divergence_of_exactly_zero_and_the_gradient_of_cross_entropy() -> None:
    features, weight, labels, _ = case(31, 8, 1019, apart=0.0)
    sums = linear_r_drop(features, weight, labels, alpha=7.0, label_smoothing=0.1, chunk_tokens=10)
    assert sums.kl.item() == 0.0
    plain = reference_linear_cross_entropy(features[0], weight, labels, label_smoothing=0.1, chunk_tokens=10)[0]
    torch.testing.assert_close(sums.loss, plain)
    expected = torch.autograd.grad(plain, weight)
    torch.testing.assert_close(torch.autograd.grad(sums.loss, weight), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 7])
def test_gradients_equal_finite_differences(num_rows) -> None:
    features, weight, labels, token_weights = case(num_rows, 4, 9, dtype=torch.float64)
    options = {"alpha": 3.0, "label_smoothing": 0.1, "chunk_tokens": 3, "token_weights": token_weights}
    assert torch.autograd.gradcheck(lambda f, w: linear_r_drop(f, w, labels, **options).loss, (features, weight))


def test_no_token_gives_exactly_zero() -> None:
    features, weight, labels, _ = case(0, 4, 9)
    for value in outcome(linear_r_drop, features, weight, labels, alpha=1.0, label_smoothing=0.1, chunk_tokens=4):
        assert torch.equal(value, torch.zeros_like(value))


def test_passes_that_exclude_each_other_have_finite_sums() -> None:
    features = torch.tensor([[[200.0]], [[-200.0]]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    sums = linear_r_drop(features, weight, torch.tensor([1]), alpha=1.0, label_smoothing=0.0, chunk_tokens=2)
    assert sums.nll.item() == 200.0
    assert sums.kl.item() == 400.0
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(sums.loss, (features, weight)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_full_precision_sums(dtype) -> None:
    features, weight, labels, token_weights = case(123, 16, 77)
    features = features.detach().to(dtype).requires_grad_()
    weight = (weight.detach() / 8).to(dtype).requires_grad_()  # logits below 3, so rounded by little more than one step
    options = {"alpha": 1.0, "label_smoothing": 0.1, "chunk_tokens": 50}
    ours = outcome(linear_r_drop, features, weight, labels, token_weights=token_weights, **options)
    exact = [tensor.detach().double().requires_grad_() for tensor in (features, weight)]
    expected = outcome(reference_linear_r_drop, *exact, labels, token_weights=token_weights.double(), **options)
    step = torch.finfo(dtype).eps
    assert [value.dtype for value in ours] == [torch.float32] * 3 + [dtype] * 2
    for value, target in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), target, rtol=step, atol=step * target.abs().max().item())


def test_autocast_computes_in_its_dtype() -> None:
    features, weight, labels, _ = case(23, 16, 77)
    options = {"alpha": 1.0, "label_smoothing": 0.1, "chunk_tokens": 10}
    with torch.autocast("cpu", torch.bfloat16):
        ours = outcome(linear_r_drop, features, weight, labels, **options)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in (features, weight)]
    expected = outcome(linear_r_drop, *halves, labels, **options)
    assert [value.dtype for value in ours] == [torch.float32] * 5
    torch.testing.assert_close(ours, [value.float() for value in expected], rtol=0, atol=0)


def test_without_gradients_the_sums_are_the_same() -> None:
    features, weight, labels, _ = case(20, 16, 77)
    options = {"alpha": 1.0, "label_smoothing": 0.1, "chunk_tokens": 10}
    learned = linear_r_drop(features, weight, labels, **options)
    with torch.no_grad():
        scored = linear_r_drop(features, weight, labels, **options)
    assert not scored.loss.requires_grad
    assert not learned.kl.requires_grad
    assert [value.tolist() for value in scored] == [value.tolist() for value in learned]


PEAK = """
import torch
from dstrain.ops.token_loss.r_drop import linear_r_drop

def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

features = torch.randn(2, 1024, 32, requires_grad=True)
weight = torch.randn(65536, 32, requires_grad=True)
labels = torch.randint(65536, (1024,))
(features[0, :64] @ weight[:64].T).sum().backward()
before = peak_kib()
linear_r_drop(features, weight, labels, alpha=1.0, label_smoothing=0.1, chunk_tokens=256).loss.backward()
assert weight.grad.abs().sum() > 0
print(peak_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of the resident memory is read from Linux's /proc")
def test_logits_never_exist_in_full() -> None:
    """2 x 1,024 tokens x 65,536 entries are 512 MiB in fp32; a chunk of 256 is 64 MiB, and three times that is needed."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    peak_mib = int(run.stdout) / 1024
    assert 64 < peak_mib < 260
