"""Kernels of single decoding steps beside the formulas: few queries over blocks of keys, products with packed weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.ops.attention import attention_reference
from dstrain.ops.cpu.attention import KEY_BLOCK
from dstrain.ops.cpu.linear import SMALLEST, packed_linear, transposed_linear
from dstrain.ops.cpu.panels import native_linear
from dstrain.ops.kernel import Op
from dstrain.ops.kernels import DECODING_ATTENTION, FIXED_LINEAR, plain_linear
from tests.kernels import NEEDS_COMPILER

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["decoding_products", "scaled_dot_product_attention"])
@pytest.mark.parametrize("bias_shape", [(1, 1, 2 * KEY_BLOCK), (15, 1, 2 * KEY_BLOCK), (15, 4, 2 * KEY_BLOCK), (1, 1, 1)])
def test_few_queries_over_blocks_of_keys(name: str, bias_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(15, 4, 6, generator=generator)
    key, value = torch.randn(2, 15, 2 * KEY_BLOCK, 6, generator=generator)
    bias = torch.randn(bias_shape, generator=generator)
    with DECODING_ATTENTION.forced(name):
        found = DECODING_ATTENTION.choose(CPU, torch.float32)(query, key, value, bias)
    expected = attention_reference(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), bias=bias.unsqueeze(0))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prepare", [packed_linear, transposed_linear, pytest.param(native_linear, marks=NEEDS_COMPILER)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (32, 7), (130, 64)])
def test_a_copy_of_a_weight_multiplies_as_the_weight_does(
    shape: tuple[int, int], has_bias: bool, prepare: Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], generator=generator) if has_bias else None
    run = prepare(weight, bias)
    for rows in (1, 5, 33):
        x = torch.randn(rows, shape[1], generator=generator)
        torch.testing.assert_close(run(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_without_a_compiler_large_weights_of_a_cpu_are_packed_and_small_ones_transposed() -> None:
    by_torch = Op("by_torch", [kernel for kernel in FIXED_LINEAR.kernels if not kernel.native])
    assert by_torch.choose(CPU, torch.float32, SMALLEST) is packed_linear
    assert by_torch.choose(CPU, torch.float32, SMALLEST - 1) is transposed_linear
    assert FIXED_LINEAR.choose(CPU, torch.bfloat16, SMALLEST) is plain_linear
    assert FIXED_LINEAR.choose(torch.device("cuda"), torch.float32, SMALLEST) is plain_linear
