"""The chunked projection and loss against its reference, torch's own cross-entropy, finite differences and its memory promise."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dstrain.ops.chunk_size import CPU_BYTES, CPU_LEAST, GPU_BYTES, resolve_chunk_tokens
from dstrain.ops.kernels import MATMUL
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy, linear_nll, reference_linear_cross_entropy


def case(num_rows: int, width: int, vocab_size: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    features = torch.randn(num_rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    return features, weight, labels


def outcome(function, features: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0, **options) -> list[Tensor]:
    loss_sum, nll_sum = function(features, weight, labels, **options)
    return [loss_sum.detach(), nll_sum, *torch.autograd.grad(scale * loss_sum, (features, weight))]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 123, "auto"])
@pytest.mark.parametrize("shape", [(123, 16, 77), (5, 3, 2), (1, 1, 5), (64, 32, 1031)])
def test_equals_the_reference(shape, chunk_tokens, label_smoothing) -> None:
    inputs = case(*shape)
    options = {"label_smoothing": label_smoothing, "chunk_tokens": chunk_tokens}
    expected = outcome(reference_linear_cross_entropy, *inputs, scale=0.37, **options)
    torch.testing.assert_close(outcome(linear_cross_entropy, *inputs, scale=0.37, **options), expected, rtol=1e-5, atol=1e-5)


def test_the_tokens_of_a_chunk_by_device_and_vocabulary() -> None:
    assert [resolve_chunk_tokens(7, device, 10**6) for device in ("cpu", "cuda")] == [7, 7]
    assert [resolve_chunk_tokens("auto", "cpu", entries) for entries in (100, 65_536, 131_072, 10**6)] == [
        1024,
        1024,
        512,
        CPU_LEAST,
    ]
    for entries in (100, 8_000, 256_000):
        tokens = resolve_chunk_tokens("auto", "cuda", entries)
        assert 4 * tokens * entries <= GPU_BYTES < 4 * (tokens + 1) * entries
    assert resolve_chunk_tokens("auto", "cuda", 10**9) == 1
    assert 4 * resolve_chunk_tokens("auto", "cpu", 200_000) * 200_000 <= CPU_BYTES


def test_equals_the_reference_to_the_last_digits_in_double() -> None:
    inputs = case(123, 16, 77, dtype=torch.float64)
    options = {"label_smoothing": 0.1, "chunk_tokens": 50}
    expected = outcome(reference_linear_cross_entropy, *inputs, **options)
    torch.testing.assert_close(outcome(linear_cross_entropy, *inputs, **options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_bfloat16_weight_is_rounded_unless_it_may_be_float32(dtype: torch.dtype) -> None:
    features, weight, labels = case(64, 32, 103, dtype=torch.bfloat16)
    weight.grad_dtype = dtype
    linear_cross_entropy(features, weight, labels, label_smoothing=0.1, chunk_tokens=20)[0].backward()
    assert weight.grad is not None and weight.grad.dtype == dtype
    is_rounded = weight.grad.bfloat16() == weight.grad
    assert bool(is_rounded.all()) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("function", [linear_cross_entropy, reference_linear_cross_entropy])
def test_equals_torch(function) -> None:
    """torch smooths over V entries instead of V - 1: its label_smoothing is ours times V / (V - 1)."""
    features, weight, labels = case(123, 16, 77, dtype=torch.float64)
    ours = outcome(function, features, weight, labels, label_smoothing=0.1, chunk_tokens=50)
    logits = features @ weight.T
    loss_sum = F.cross_entropy(logits, labels, label_smoothing=0.1 * 77 / 76, reduction="sum")
    nll = F.cross_entropy(logits, labels, reduction="none")
    expected = [loss_sum.detach(), nll.detach(), *torch.autograd.grad(loss_sum, (features, weight))]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("num_rows", [0, 7])
def test_gradients_equal_finite_differences(num_rows, label_smoothing) -> None:
    features, weight, labels = case(num_rows, 4, 9, dtype=torch.float64)
    options = {"label_smoothing": label_smoothing, "chunk_tokens": 3}
    assert torch.autograd.gradcheck(lambda f, w: linear_cross_entropy(f, w, labels, **options)[0], (features, weight))


def test_no_token_gives_exactly_zero() -> None:
    for value in outcome(linear_cross_entropy, *case(0, 4, 9), label_smoothing=0.1, chunk_tokens=4):
        assert torch.equal(value, torch.zeros_like(value))


def test_the_nll_of_each_token() -> None:
    features, weight, labels = case(123, 16, 77, dtype=torch.float64)
    expected = F.cross_entropy(features @ weight.T, labels, reduction="none").detach()
    torch.testing.assert_close(linear_nll(features, weight, labels, chunk_tokens=50), expected, rtol=1e-12, atol=1e-12)


def test_the_nll_of_a_certain_token_keeps_its_digits() -> None:
    """1e-9 beside logits of 20: the difference of two numbers of that size in fp32 would be 0 or 2e-6."""
    weight = torch.tensor([[20.0], [20.0 - 20.7]])
    (nll,) = linear_nll(torch.ones(1, 1), weight, torch.zeros(1, dtype=torch.int64), chunk_tokens=1)
    expected = linear_nll(torch.ones(1, 1).double(), weight.double(), torch.zeros(1, dtype=torch.int64), chunk_tokens=1)
    assert nll.item() == pytest.approx(expected.item(), abs=6e-8)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 4096])
def test_weighted_rows_equal_the_reference(chunk_tokens, label_smoothing) -> None:
    """The loss and its gradients are weighted, the negative log-likelihood is not."""
    inputs = case(123, 16, 77)
    token_weights = 1 / torch.arange(1.0, 124.0)
    options = {"label_smoothing": label_smoothing, "chunk_tokens": chunk_tokens}
    expected = outcome(reference_linear_cross_entropy, *inputs, token_weights=token_weights, **options)
    found = outcome(linear_cross_entropy, *inputs, token_weights=token_weights, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = outcome(linear_cross_entropy, *inputs, **options)
    assert torch.equal(found[1], plain[1])
    assert found[0] < plain[0] / 10
    ones = outcome(linear_cross_entropy, *inputs, token_weights=torch.ones(123), **options)
    torch.testing.assert_close(ones, plain, rtol=0, atol=0)


def test_gradients_of_weighted_rows_equal_finite_differences() -> None:
    features, weight, labels = case(7, 4, 9, dtype=torch.float64)
    options = {"label_smoothing": 0.2, "chunk_tokens": 3, "token_weights": torch.rand(7)}
    assert torch.autograd.gradcheck(lambda f, w: linear_cross_entropy(f, w, labels, **options)[0], (features, weight))


def test_small_weights_of_rows_do_not_underflow_in_half_precision() -> None:
    """A gradient of 1e-4 at a weight of 1e-4 is less than float16's smallest number, but the gradient is of features and
    weight."""
    features = torch.full((4096, 1), 64.0, dtype=torch.float16)
    weight = torch.tensor([[0.125], [0.0], [-0.0179]], dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(4096, dtype=torch.int64)
    token_weights = torch.full((4096,), 1e-4)
    loss = linear_cross_entropy(features, weight, labels, label_smoothing=0.0, chunk_tokens=64, token_weights=token_weights)[0]
    exact = weight.detach().double().requires_grad_()
    expected = reference_linear_cross_entropy(
        features.double(), exact, labels, label_smoothing=0.0, chunk_tokens=64, token_weights=token_weights
    )[0]
    found, target = (torch.autograd.grad(value, leaf)[0] for value, leaf in ((loss, weight), (expected, exact)))
    torch.testing.assert_close(found.double(), target, rtol=2e-3, atol=0)


def test_a_label_far_below_the_others_has_a_finite_loss() -> None:
    features, weight = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss_sum, nll_sum = linear_cross_entropy(features, weight, torch.tensor([1]), label_smoothing=0.0, chunk_tokens=1)
    assert loss_sum.item() == nll_sum.item() == 400.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_a_full_precision_loss(dtype) -> None:
    """The reference reads the same rounded inputs in float64; what is left are the roundings of three products."""
    features, weight, labels = case(123, 16, 77)
    features = features.detach().to(dtype).requires_grad_()
    weight = (weight.detach() / 8).to(dtype).requires_grad_()  # logits below 3, so rounded by little more than one step
    options = {"label_smoothing": 0.1, "chunk_tokens": 50}
    ours = outcome(linear_cross_entropy, features, weight, labels, **options)
    exact = [tensor.detach().double().requires_grad_() for tensor in (features, weight)]
    expected = outcome(reference_linear_cross_entropy, *exact, labels, **options)
    step = torch.finfo(dtype).eps
    assert [value.dtype for value in ours] == [torch.float32, torch.float32, dtype, dtype]
    for value, target in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), target, rtol=step, atol=step * target.abs().max().item())


def test_many_small_gradients_add_up_in_half_precision() -> None:
    """4,096 rows of one direction: a sum kept in bfloat16 would stop growing at 256 times its terms."""
    features = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(4096, dtype=torch.int64)
    linear_cross_entropy(features, weight, labels, label_smoothing=0.0, chunk_tokens=1)[0].backward()
    assert weight.grad.flatten().tolist() == [-3072.0, 1024.0, 1024.0, 1024.0]


def test_autocast_computes_in_its_dtype_and_returns_the_gradients_in_the_inputs_dtype() -> None:
    features, weight, labels = case(23, 16, 77)
    options = {"label_smoothing": 0.1, "chunk_tokens": 10}
    with torch.autocast("cpu", torch.bfloat16):
        ours = outcome(linear_cross_entropy, features, weight, labels, **options)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in (features, weight)]
    expected = outcome(linear_cross_entropy, *halves, labels, **options)
    assert [value.dtype for value in ours] == [torch.float32] * 4
    torch.testing.assert_close(ours, [value.float() for value in expected], rtol=0, atol=0)


class ProductCounter(TorchDispatchMode):
    """Counts matrix products by the shape of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.addmm}:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize(
    ("features_learn", "weight_learns", "grad_mode", "per_chunk"),
    [
        (True, True, True, [(10, 77), (10, 16), (77, 16)]),
        (True, False, True, [(10, 77), (10, 16)]),
        (False, True, True, [(10, 77), (77, 16)]),
        (False, False, True, [(10, 77)]),
        (True, True, False, [(10, 77)]),
    ],
)
def test_only_required_gradients_are_computed(features_learn, weight_learns, grad_mode, per_chunk) -> None:
    features, weight, labels = case(20, 16, 77)
    options = {"label_smoothing": 0.1, "chunk_tokens": 10}
    with MATMUL.forced("torch"):
        expected = outcome(linear_cross_entropy, features, weight, labels, **options)
    features.requires_grad_(features_learn)
    weight.requires_grad_(weight_learns)
    with torch.set_grad_enabled(grad_mode), MATMUL.forced("torch"), ProductCounter() as counter:
        loss_sum, nll_sum = linear_cross_entropy(features, weight, labels, **options)
    assert counter.shapes == per_chunk * 2
    assert torch.equal(loss_sum, expected[0])
    assert torch.equal(nll_sum, expected[1])
    assert not nll_sum.requires_grad
    assert loss_sum.requires_grad == (grad_mode and (features_learn or weight_learns))
    if loss_sum.requires_grad:
        loss_sum.backward()
        assert features.grad is None or torch.equal(features.grad, expected[2])
        assert weight.grad is None or torch.equal(weight.grad, expected[3])
        assert (features.grad is None, weight.grad is None) == (not features_learn, not weight_learns)


def test_the_weight_may_be_gone_before_backward() -> None:
    """Sharded training frees it after the projection's forward."""
    features, weight, labels = case(20, 16, 77)
    options = {"label_smoothing": 0.1, "chunk_tokens": 10}
    expected = outcome(linear_cross_entropy, features, weight, labels, **options)[2]
    gathered = weight.detach().clone().requires_grad_()
    loss_sum, _ = linear_cross_entropy(features, gathered, labels, **options)
    gathered.untyped_storage().resize_(0)
    assert torch.equal(torch.autograd.grad(loss_sum, features)[0], expected)


PEAK = """
import torch
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy

def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

features = torch.randn(4096, 32, requires_grad=True)
weight = torch.randn(65536, 32, requires_grad=True)
labels = torch.randint(65536, (4096,))
(features[:64] @ weight[:64].T).sum().backward()
before = peak_kib()
linear_cross_entropy(features, weight, labels, label_smoothing=0.1, chunk_tokens=256)[0].backward()
assert weight.grad.abs().sum() > 0
print(peak_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of the resident memory is read from Linux's /proc")
def test_logits_never_exist_in_full() -> None:
    """4,096 tokens x 65,536 entries are 1 GiB in fp32; 256 tokens at a time, a sixteenth, beside the gradients (8 MiB each)."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    peak_mib = int(run.stdout) / 1024
    assert 64 < peak_mib < 160
