"""Activations by name. `gelu` is the exact one (erf), `gelu_tanh` its approximation; `linear` leaves its input alone."""

from collections.abc import Callable
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor) -> Tensor:
    """x itself."""
    return x


ACTIVATIONS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "tanh": torch.tanh,
        "linear": linear,
    }
)
"""Every name that `model.activation` may take -> (..., D) -> (..., D)."""
