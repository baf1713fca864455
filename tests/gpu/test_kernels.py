"""Triton's kernels, compiled, at the sizes of training: equal to the references in float64."""

import pytest
import torch

from tests.gpu.checks import need_memory
from tests.gpu.kernel_checks import CASES, CHECKS, CLOSE, REAL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_a_kernel_of_triton_is_its_reference(op: str, case: str, dtype: torch.dtype) -> None:
    need_memory(40)
    assert CHECKS[op][case](torch.device("cuda"), dtype, REAL) < CLOSE[dtype]
