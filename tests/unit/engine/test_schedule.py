"""Learning rates against values written out by hand, and against formulas of the predecessor."""

import math

import pytest
from pydantic import ValidationError

from dstrain.engine.config import (
    ConstantSchedule,
    CosineSchedule,
    FallingSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    PolynomialSchedule,
    ScheduleConfig,
    WsdSchedule,
)
from dstrain.engine.schedule import learning_rate


def rates(schedule: ScheduleConfig, peak: float, steps: int) -> list[float]:
    return [learning_rate(schedule, peak, step) for step in range(steps)]


def test_inverse_sqrt() -> None:
    found = rates(InverseSqrtSchedule(warmup_steps=4, warmup_init=0.2), 1.0, 17)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [found[9], found[16]] == pytest.approx([2 / 3, 0.5])


def test_inverse_sqrt_equals_the_predecessors_formula() -> None:
    peak, warmup, first = 0.005, 2000, 1e-7
    schedule = InverseSqrtSchedule(warmup_steps=warmup, warmup_init=first)
    for step in (0, 1, 1999, 2000, 2001, 8000, 123457):
        expected = first + step * (peak - first) / warmup if step < warmup else peak * warmup**0.5 * step**-0.5
        assert learning_rate(schedule, peak, step) == pytest.approx(expected, rel=1e-14)


def test_constant() -> None:
    assert rates(ConstantSchedule(warmup_steps=2), 3.0, 5) == pytest.approx([0.0, 1.5, 3.0, 3.0, 3.0])
    assert rates(ConstantSchedule(), 3.0, 3) == [3.0, 3.0, 3.0]


def test_linear() -> None:
    schedule = LinearSchedule(warmup_steps=2, total_steps=6, final=0.2)
    assert rates(schedule, 1.0, 9) == pytest.approx([0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_cosine() -> None:
    schedule = CosineSchedule(warmup_steps=1, warmup_init=0.5, total_steps=5, final=0.1)
    middle, side = 0.55, 0.45 * math.cos(math.pi / 4)
    assert rates(schedule, 1.0, 8) == pytest.approx([0.5, 1.0, middle + side, middle, middle - side, 0.1, 0.1, 0.1])


def test_polynomial() -> None:
    schedule = PolynomialSchedule(warmup_steps=2, total_steps=6, power=2.0, final=0.1)
    assert rates(schedule, 1.7, 8) == pytest.approx([0.0, 0.85, 1.7, 1.0, 0.5, 0.2, 0.1, 0.1])


def test_polynomial_of_power_one_is_linear() -> None:
    common = {"warmup_steps": 3, "total_steps": 11, "final": 0.01}
    assert rates(PolynomialSchedule(power=1.0, **common), 0.3, 15) == rates(LinearSchedule(**common), 0.3, 15)


def test_wsd() -> None:
    schedule = WsdSchedule(warmup_steps=2, total_steps=10, decay_steps=4, final=0.2)
    assert rates(schedule, 1.0, 12) == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


@pytest.mark.parametrize("kind", [LinearSchedule, CosineSchedule, PolynomialSchedule])
def test_a_fall_of_no_length_is_refused(kind: type[FallingSchedule]) -> None:
    with pytest.raises(ValidationError, match="warmup_steps = 5 reaches total_steps = 5; raise total_steps"):
        kind(warmup_steps=5, total_steps=5)


def test_warm_up_and_decay_must_fit() -> None:
    with pytest.raises(ValidationError, match="warmup_steps = 3 and decay_steps = 3 exceed total_steps = 5"):
        WsdSchedule(warmup_steps=3, decay_steps=3, total_steps=5)
    assert rates(WsdSchedule(warmup_steps=2, decay_steps=3, total_steps=5), 1.0, 6) == pytest.approx([0, 0.5, 1, 2 / 3, 1 / 3, 0])
