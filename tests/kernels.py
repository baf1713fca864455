"""Kernels that this machine can run, as parameters of tests: those in C++ need a compiler."""

import pytest
import torch

from dstrain.ops.cpu import native
from dstrain.ops.kernels import OPS

NEEDS_COMPILER = pytest.mark.skipif(native.problem() is not None, reason=f"kernels in C++: {native.problem()}")


def kernels_here(op: str) -> list[str]:
    """Names of an op's kernels for float32 on a CPU."""
    return [
        name for name in dict.fromkeys(each.name for each in OPS[op].kernels) if not OPS[op].problem(name, "cpu", torch.float32)
    ]
