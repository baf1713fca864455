"""Activations against their formulas."""

import math
from typing import get_args

import pytest
import torch

from dstrain.models.config import Activation
from dstrain.ops.activation import ACTIVATIONS

FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "linear": lambda x: x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formula(name: str) -> None:
    x = [-5.0, -1.3, -0.1, 0.0, 0.4, 2.0, 7.5]
    expected = torch.tensor([FORMULAS[name](value) for value in x])
    torch.testing.assert_close(ACTIVATIONS[name](torch.tensor(x)), expected, rtol=1e-5, atol=1e-6)


def test_every_configurable_name_is_there() -> None:
    assert set(get_args(Activation)) == set(ACTIVATIONS) == set(FORMULAS)
