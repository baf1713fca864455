"""The checks that a GPU runs at real sizes (`tests/gpu/kernel_checks.py`), at toy size by the interpreter."""

import pytest
import torch

from tests.gpu.kernel_checks import CASES, CHECKS, CLOSE, TOY


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_a_check_of_a_gpu_passes_at_toy_size(op: str, case: str, dtype: torch.dtype) -> None:
    assert CHECKS[op][case](torch.device("cpu"), dtype, TOY) < CLOSE[dtype]
