"""Rows of a table, and the sum of their gradients."""

import pytest
import torch
from torch.nn import functional as F

from dstrain.ops.lookup import lookup


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("may_be_float32", [True, False])
def test_a_gradient_is_summed_in_float32_and_rounded_at_most_once(dtype: torch.dtype, may_be_float32: bool) -> None:
    """Of a token that is there 3,000 times, and of one that is not."""
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(0, 4, (5, 2400), generator=generator)
    table, output_grad = torch.randn(5, 6, generator=generator).to(dtype), torch.randn(5, 2400, 6, generator=generator).to(dtype)
    table = torch.nn.Parameter(table)
    if may_be_float32:
        table.grad_dtype = torch.float32
    rows = lookup(indices, table)
    assert torch.equal(rows, F.embedding(indices, table))
    rows.backward(output_grad)
    exact = torch.zeros(5, 6, dtype=torch.float64).index_add(0, indices.flatten(), output_grad.double().flatten(0, 1))
    assert table.grad is not None and table.grad.dtype == (torch.float32 if may_be_float32 else dtype)
    tolerance = 1e-6 if may_be_float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(table.grad.double(), exact, rtol=tolerance, atol=1e-3)
    assert table.grad[4].eq(0).all()


def test_no_gradient_of_a_frozen_table() -> None:
    table = torch.randn(5, 6).bfloat16()
    assert not lookup(torch.tensor([1, 2]), table).requires_grad
    with torch.no_grad():
        assert not lookup(torch.tensor([1, 2]), table.requires_grad_()).requires_grad
