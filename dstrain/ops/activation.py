"""Activations by name. `gelu` is the exact one (erf), `gelu_tanh` its approximation; `linear` is the identity."""

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

TensorMap = Callable[[Tensor], Tensor]
"""A function of one tensor."""


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


def gelu_tanh(x: Tensor) -> Tensor:
    """A function with a name, which a copy of a model keeps: kernels know activations by it."""
    return F.gelu(x, approximate="tanh")


def composed_gate(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up. (..., D), (..., D) -> (..., D)"""
    return activation(gate) * up


ACTIVATIONS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": gelu_tanh,
        "silu": F.silu,
        "tanh": torch.tanh,
        "linear": identity,
    }
)
"""Every name that `model.activation` may take -> (..., D) -> (..., D)."""
