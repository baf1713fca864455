"""Products in C++ beside float64."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dstrain.ops.cpu import native
from dstrain.ops.cpu.products import LEAST_SIZE, native_matmul, torch_matmul
from dstrain.ops.kernel import Op
from dstrain.ops.kernels import MATMUL, matmul_kernel
from dstrain.ops.linear import linear
from tests.kernels import NEEDS_COMPILER

pytestmark = NEEDS_COMPILER

SIZES = [(1, 1, 1), (7, 3, 5), (9, 64, 33), (64, 512, 256), (131, 1030, 300), (300, 17, 31), (0, 4, 5), (4, 0, 5), (4, 5, 0)]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def matrix(rows: int, columns: int, layout: str) -> Tensor:
    """Of random numbers, which lie row by row, column by column, between others, or two by two apart."""
    generator = torch.Generator().manual_seed(rows + columns)
    if layout == "transposed":
        return torch.randn(columns, rows, generator=generator).t()
    step = {"rows": 0, "slice": 3, "apart": columns}[layout]
    wide = torch.randn(rows, columns + step, generator=generator)
    return wide[:, ::2] if layout == "apart" else wide[:, step:]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "layouts", [("rows", "transposed"), ("rows", "rows"), ("transposed", "rows"), ("slice", "slice"), ("apart", "apart")]
)
@pytest.mark.parametrize("size", SIZES)
def test_any_size_and_layout(size: tuple[int, int, int], layouts: tuple[str, str]) -> None:
    rows, inner, columns = size
    left, right, bias = matrix(rows, inner, layouts[0]), matrix(inner, columns, layouts[1]), matrix(1, columns, "rows")[0]
    exact = left.double() @ right.double()
    tolerance = {"rtol": 0, "atol": 1e-6 + 2e-7 * inner}
    torch.testing.assert_close(native_matmul(left, right).double(), exact, **tolerance)
    torch.testing.assert_close(native_matmul(left, right, bias=bias).double(), exact + bias.double(), **tolerance)
    around = torch.zeros(rows + 2, columns + 7)
    out = around[1:-1, 4:-3]
    assert native_matmul(left, right, out=out) is out
    torch.testing.assert_close(out.double(), exact, **tolerance)
    native_matmul(left, right, out=out, add=True)
    torch.testing.assert_close(out.double(), 2 * exact, rtol=0, atol=2 * tolerance["atol"])
    assert around.count_nonzero() == out.count_nonzero()  # nothing was written beside it


def test_an_expanded_gradient_and_an_output_of_columns() -> None:
    left, right = torch.randn(1, 1).expand(70, 40), torch.randn(40, 6)
    out = torch.empty(6, 70).t()
    native_matmul(left, right, out=out)
    torch.testing.assert_close(out.double(), left.double() @ right.double(), rtol=0, atol=1e-5)


def test_a_row_has_the_same_bits_beside_any_others_and_by_any_threads() -> None:
    left, right, before = matrix(200, 700, "rows"), matrix(700, 90, "transposed"), torch.get_num_threads()
    expected = native_matmul(left, right)
    for layout in (left, left.t().contiguous().t()):
        assert torch.equal(torch.cat([native_matmul(layout[at : at + 13], right) for at in range(0, 200, 13)]), expected)
    try:
        torch.set_num_threads(5)
        assert torch.equal(native_matmul(left, right), expected)
    finally:
        torch.set_num_threads(before)


def test_the_sign_of_a_negated_view_is_read() -> None:
    left = torch.randn(70, 70, dtype=torch.complex64).conj().imag
    assert left.is_neg()
    torch.testing.assert_close(native_matmul(left, torch.eye(70)), left)
    torch.testing.assert_close(native_matmul(left, torch.eye(70), out=torch.empty(70, 70)), left)


def test_an_output_whose_rows_are_one_memory_is_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="single memory location"):
        native_matmul(torch.ones(70, 70), torch.ones(70, 70), out=torch.ones(1, 70).expand(70, 70))


def test_tensors_without_memory() -> None:
    with FakeTensorMode():
        left, right, out = (torch.empty(shape) for shape in ((70, 80), (80, 90), (70, 90)))
        assert native_matmul(left, right).shape == (70, 90)
        assert native_matmul(left, right, out=out) is out


@pytest.mark.parametrize(("vendor", "kernel"), [("AuthenticAMD", "native"), ("GenuineIntel", "torch")])
def test_who_gets_it_unasked(vendor: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_processor", lambda: [f"vendor_id\t: {vendor}"])
    kernels = [replace(each, on_request=not native.is_amd.__wrapped__()) if each.native else each for each in MATMUL.kernels]
    op = Op("matmul", kernels)
    chosen = op.choose(torch.device("cpu"), torch.float32, LEAST_SIZE)
    assert chosen is {"native": native_matmul, "torch": torch_matmul}[kernel]
    for size, dtype in ((LEAST_SIZE - 1, torch.float32), (LEAST_SIZE, torch.bfloat16)):
        assert op.choose(torch.device("cpu"), dtype, size) is torch_matmul
    assert op.choose(torch.device("cuda"), torch.float32, LEAST_SIZE) is torch_matmul


def test_the_size_of_a_narrow_product_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[torch.dtype, int]] = []
    monkeypatch.setattr(MATMUL, "choose", lambda device, dtype, size: sizes.append((dtype, size)))
    wide = torch.ones(70, 90)
    for left, right in ((wide, torch.ones(90, 8)), (wide.t(), wide), (wide[:, :5], torch.ones(5, 90).bfloat16())):
        matmul_kernel(left, right)
    assert sizes == [(torch.float32, 0), (torch.float32, 90 * 70 * 90), (torch.bfloat16, 0)]


def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    left, right = torch.ones(70, 4), torch.ones(4, 33)
    left[69, 1], right[2, 32] = float("nan"), float("inf")
    result = native_matmul(left, right)
    assert result[:69, :32].eq(4).all()
    assert result[69].isnan().all()
    assert result[:69, 32].isinf().all()


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        (((70, 4), (5, 6), (6,)), torch.float32),
        (((70, 4), (4, 6), (5,)), torch.float32),
        (((70, 4), (4, 6), (6,)), torch.float64),
    ],
)
def test_what_does_not_fit_is_refused_by_torch(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    left, right, bias = (torch.ones(shape) for shape in shapes)
    with pytest.raises(RuntimeError):
        native_matmul(left, right.to(dtype), bias=bias)


@pytest.mark.parametrize("kernel", ["native", "of the table"])
def test_a_compiled_graph_for_all_sizes_holds_another_kernel(kernel: str) -> None:
    """One that does not ask for the number of rows."""
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend=(counter := CompileCounter()), fullgraph=True, dynamic=True)
    weight = torch.randn(70, 40, requires_grad=True)
    with MATMUL.forced("native") if kernel == "native" else nullcontext():
        MATMUL.states("cpu", torch.float32)  # looks the table up, as the header of a training does
        for rows in (3, 300):
            x = torch.randn(rows, 40, requires_grad=True)
            assert torch.equal(compiled(x, weight), F.linear(x, weight))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_table_that_a_graph_is_the_first_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(MATMUL, "_kernels_in_use", {})
    x, weight = torch.randn(300, 90, requires_grad=True), torch.randn(400, 90)
    assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(x, weight), F.linear(x, weight))
    assert MATMUL.states("cpu", torch.float32)["torch"].is_chosen
    torch._dynamo.reset()


def test_the_linear_map_of_the_layers() -> None:
    """Its values and gradients, with a weight that two maps share."""
    parts = [torch.randn(shape) / 9 for shape in ((2, 100, 90), (90, 90), (90,))]
    outcomes = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        x, weight, bias = (part.detach().to(dtype).requires_grad_() for part in parts)
        with MATMUL.forced("native"):
            product = function(function(x, weight, bias), weight)
            grads = torch.autograd.grad(product.sin().sum(), (x, weight, bias))
        outcomes.append([each.double() for each in (product, *grads)])
    for own, exact in zip(*outcomes, strict=True):
        torch.testing.assert_close(own, exact, rtol=0, atol=1e-5 * float(exact.detach().abs().max()))
