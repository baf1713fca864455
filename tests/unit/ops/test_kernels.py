"""The table of kernels: what it chooses, that it can be overridden, and what it says of itself."""

import pytest
import torch

from dstrain.ops.kernels import ARGMAX, OPS, TRAINING_ATTENTION, Kernel, Op, describe_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("op", "device", "dtype", "size", "name"),
    [
        (TRAINING_ATTENTION, CPU, torch.float32, 400, "batched_products"),
        (TRAINING_ATTENTION, CPU, torch.float32, 401, "scaled_dot_product_attention"),
        (TRAINING_ATTENTION, CPU, torch.bfloat16, 40_000, "batched_products"),
        (TRAINING_ATTENTION, CPU, torch.float64, 1, "scaled_dot_product_attention"),
        (TRAINING_ATTENTION, CUDA, torch.float32, 1, "scaled_dot_product_attention"),
        (ARGMAX, CPU, torch.float64, 0, "numpy"),
        (ARGMAX, CPU, torch.bfloat16, 0, "torch"),
        (ARGMAX, CUDA, torch.float32, 0, "torch"),
    ],
)
def test_the_first_kernel_that_fits_is_chosen(op: Op, device: torch.device, dtype: torch.dtype, size: int, name: str) -> None:
    chosen = op.choose(device, dtype, size)
    assert chosen in {kernel.function for kernel in op.kernels if kernel.name == name}


def test_a_kernel_whose_package_is_missing_is_passed_over_and_described_so() -> None:
    missing = Kernel("library", torch.sin, package="no_such_package", device_type="cpu")
    present = Kernel("installed", torch.cos, package="numpy", dtypes=(torch.float64,))
    op = Op("toy", [missing, present, Kernel("fallback", torch.tan)])
    assert op.choose(CPU, torch.float32) is torch.tan
    assert op.choose(CPU, torch.float64) is torch.cos
    assert missing.condition("") == "cpu, no_such_package (not installed)"
    assert present.condition("") == "any device, float64, numpy"


def test_a_forced_kernel_is_taken_until_the_end_of_the_block() -> None:
    with ARGMAX.forced("torch"):
        assert ARGMAX.choose(CPU, torch.float32) is ARGMAX.kernels[-1].function
    assert ARGMAX.choose(CPU, torch.float32) is ARGMAX.kernels[0].function


def test_every_argmax_takes_the_first_of_equal_values() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 0.0], [0.0, 0.0, 5.0]])
    for kernel in ARGMAX.kernels:
        assert kernel.function(scores).tolist() == [[1], [0], [2]]


def test_the_table_in_words() -> None:
    lines = describe_kernels().splitlines()
    assert len(lines) == sum(len(op.kernels) for op in OPS)
    assert lines[0].split(maxsplit=2) == ["training_attention", "batched_products", "cpu, float32, up to 400 scores per head"]
    assert lines[-1].split(maxsplit=2) == ["argmax", "torch", "any device"]
