"""How far a student's vector of each token is from a teacher's: features (n, D), or attention probabilities over n keys.

| kind | value | of | source |
|---|---|---|---|
| mse | 1/D sum (s - t)^2 | features | Romero et al. 2015 (FitNets), Jiao et al. 2020 (TinyBERT) |
| cosine | 1 - s t / (norm of s x norm of t) | either | Sanh et al. 2019 (DistilBERT) |
| squared_error | sum (s - t)^2 | probabilities | TinyBERT's formula for attention, without its division by the number of keys |
| kl | sum t log(t / s) | probabilities | Wang et al. 2020 (MiniLM) |

Keys that a token does not see have probability 0 in both and add nothing, so the three on probabilities do not depend on padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

DistanceKind = Literal["mse", "cosine", "squared_error", "kl"]


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """(n, D), (n, D) -> (n,)"""
    return (student - teacher).square().mean(1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """(n, D), (n, D) -> (n,), between 0 and 2"""
    return 1 - F.cosine_similarity(student, teacher, dim=1)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """(n, S), (n, S) -> (n,), between 0 and 2"""
    return (student - teacher).square().sum(1)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """(n, S), (n, S) -> (n,) nats; a probability of the student that has become 0 counts as the smallest number above it."""
    log_student = student.clamp_min(torch.finfo(student.dtype).tiny).log()
    return (torch.xlogy(teacher, teacher) - teacher * log_student).sum(1)


DISTANCES: dict[DistanceKind, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "cosine": cosine,
    "squared_error": squared_error,
    "kl": kl,
}
