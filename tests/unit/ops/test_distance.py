"""Distances against loops over plain numbers; what padding adds to them; their gradients where a probability is 0."""

import math

import pytest
import torch

from dstrain.ops.distance import DISTANCES, DistanceKind

ROWS = [([0.5, 0.25, 0.25], [0.1, 0.6, 0.3]), ([1.0, 0.0, 0.0], [0.2, 0.0, 0.8]), ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5])]


def by_hand(kind: DistanceKind, student: list[float], teacher: list[float]) -> float:
    pairs = list(zip(student, teacher, strict=True))
    match kind:
        case "mse":
            return sum((s - t) ** 2 for s, t in pairs) / len(pairs)
        case "squared_error":
            return sum((s - t) ** 2 for s, t in pairs)
        case "cosine":
            return 1 - sum(s * t for s, t in pairs) / math.hypot(*student) / math.hypot(*teacher)
        case "kl":
            tiny = torch.finfo(torch.float32).tiny
            return sum(t * math.log(t / max(s, tiny)) for s, t in pairs if t > 0)


@pytest.mark.parametrize("kind", DISTANCES)
def test_values_are_those_of_the_formula(kind: DistanceKind) -> None:
    student, teacher = (torch.tensor([row[side] for row in ROWS]) for side in (0, 1))
    expected = torch.tensor([by_hand(kind, *row) for row in ROWS])
    torch.testing.assert_close(DISTANCES[kind](student, teacher), expected, rtol=1e-5, atol=1e-6)
    assert DISTANCES[kind](student[:0], teacher[:0]).shape == (0,)


@pytest.mark.parametrize("kind", ["squared_error", "kl", "cosine"])
def test_keys_that_nobody_sees_add_nothing(kind: DistanceKind) -> None:
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    teacher = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)).softmax(1)
    padded = torch.nn.functional.pad
    narrow = DISTANCES[kind](scores.softmax(1), teacher).sum()
    hidden = padded(scores, (0, 3), value=torch.finfo(torch.float32).min)
    wide = DISTANCES[kind](hidden.softmax(1), padded(teacher, (0, 3))).sum()
    torch.testing.assert_close(wide, narrow)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (wide, narrow)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0.1
