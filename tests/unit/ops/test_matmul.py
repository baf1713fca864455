"""Products through numpy equal torch's, in values and gradients, whatever the memory layout; the choice follows a fixed rule."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.ops import matmul as subject

SIDE = subject.MIN_SIDE


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Makes numpy the chosen library and lists the shapes of the products that it made."""
    shapes: list[tuple[int, ...]] = []
    multiply = np.matmul

    def spy(left, right, out):
        shapes.append(out.shape)
        assert all(array.flags.c_contiguous or array.flags.f_contiguous or 4 in array.strides for array in (left, right))
        return multiply(left, right, out=out)

    monkeypatch.setattr(subject, "_NUMPY_IS_FASTER", True)
    monkeypatch.setattr(np, "matmul", spy)
    return shapes


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


LAYOUTS = {
    "plain": random,
    "transposed": lambda rows, columns: random(columns, rows).t(),
    "columns of a wider one": lambda rows, columns: random(rows, 3 * columns)[:, columns : 2 * columns],
    "every second column": lambda rows, columns: random(rows, 2 * columns)[:, ::2],
    "one row repeated": lambda rows, columns: random(1, columns).expand(rows, columns),
    "one column": lambda rows, columns: random(rows, 1).expand(rows, columns),
}


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_equals_torch_in_every_layout(products, left, right) -> None:
    a, b = LAYOUTS[left](SIDE + 3, SIDE), LAYOUTS[right](SIDE, SIDE + 5)
    out = torch.full((SIDE + 3, SIDE + 5), torch.nan)
    assert subject.matmul(a, b, out=out) is out
    torch.testing.assert_close(out, a @ b, rtol=1e-5, atol=1e-4)
    subject.add_matmul(out, a, b)
    torch.testing.assert_close(out, 2 * (a @ b), rtol=1e-5, atol=1e-4)
    assert products == [(SIDE + 3, SIDE + 5)] * 2


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((SIDE - 1, SIDE, SIDE), torch.float32),
        ((SIDE, SIDE - 1, SIDE), torch.float32),
        ((SIDE, SIDE, SIDE - 1), torch.float32),
        ((0, SIDE, SIDE), torch.float32),
        ((SIDE, SIDE, SIDE), torch.float64),
    ],
)
def test_torch_multiplies_the_rest(products, shape, dtype) -> None:
    rows, inner, columns = shape
    a, b = random(rows, inner, dtype=dtype), random(inner, columns, dtype=dtype)
    torch.testing.assert_close(subject.matmul(a, b, out=a.new_empty(rows, columns)), a @ b)
    torch.testing.assert_close(subject.linear(a, b.t(), b[0]), F.linear(a, b.t(), b[0]))
    assert products == []


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    learning = [tensor for tensor in inputs if tensor.requires_grad]
    result = function(*inputs)
    slope = torch.linspace(-1, 1, result.numel()).view_as(result)
    return [result.detach(), *torch.autograd.grad(result, learning, slope)]


@pytest.mark.parametrize("learning", [(True, True, True), (False, True, True), (True, False, False), (False, False, True)])
@pytest.mark.parametrize("shape", [(SIDE, SIDE + 1), (3, SIDE, SIDE + 1), (2, 2, SIDE, SIDE + 1)])
def test_linear_equals_torch(products, shape, learning) -> None:
    inputs = [random(*shape), random(SIDE, SIDE + 1), random(SIDE)]
    for tensor, learns in zip(inputs, learning, strict=True):
        tensor.requires_grad_(learns)
    ours = gradients(subject.linear, *inputs)
    assert len(products) == 1 + sum(learning[:2])
    torch.testing.assert_close(ours, gradients(F.linear, *inputs), rtol=1e-5, atol=1e-4)


def test_linear_without_a_bias(products) -> None:
    inputs = [random(2, SIDE, SIDE + 1).requires_grad_(), random(SIDE + 3, SIDE + 1).requires_grad_()]
    ours = gradients(subject.linear, *inputs)
    assert len(products) == 3
    torch.testing.assert_close(ours, gradients(F.linear, *inputs), rtol=1e-5, atol=1e-4)


def test_linear_of_views_and_with_a_repeated_gradient(products) -> None:
    """The input is a slice of a wider tensor, the gradient of a sum is one number seen everywhere."""
    wide = random(4, SIDE, 3 * SIDE).requires_grad_()
    weight, bias = random(SIDE, SIDE).requires_grad_(), random(SIDE).requires_grad_()
    subject.linear(wide[..., SIDE : 2 * SIDE], weight, bias).sum().backward()
    ours = [tensor.grad for tensor in (wide, weight, bias)]
    wide.grad = weight.grad = bias.grad = None
    F.linear(wide[..., SIDE : 2 * SIDE], weight, bias).sum().backward()
    torch.testing.assert_close(ours, [tensor.grad for tensor in (wide, weight, bias)], rtol=1e-5, atol=1e-4)


def test_autocast_stays_torchs(products) -> None:
    inputs = random(SIDE, SIDE), random(SIDE, SIDE), random(SIDE)
    with torch.autocast("cpu", torch.bfloat16):
        assert subject.linear(*inputs).dtype == torch.bfloat16
    assert products == []


@pytest.mark.parametrize(
    ("vendor", "threads", "chosen"),
    [("AuthenticAMD", "1", True), ("AuthenticAMD", "2", False), ("AuthenticAMD", None, False), ("GenuineIntel", "1", False)],
)
def test_the_choice_depends_on_processor_and_threads(tmp_path: Path, monkeypatch, vendor, threads, chosen) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    if threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    config = {"Build Dependencies": {"blas": {"name": "scipy-openblas"}}}
    monkeypatch.setattr(np.__config__, "CONFIG", config)
    assert subject.numpy_is_faster(tmp_path / "cpuinfo") is chosen
    assert not subject.numpy_is_faster(tmp_path / "absent")
    config["Build Dependencies"]["blas"]["name"] = "mkl"
    assert not subject.numpy_is_faster(tmp_path / "cpuinfo")
