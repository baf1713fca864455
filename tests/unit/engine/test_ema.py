"""The moving average by hand."""

import pytest
import torch

from dstrain.engine.config import EmaConfig
from dstrain.engine.ema import MovingAverage


def averages(config: EmaConfig, values: list[float]) -> list[float]:
    """The average after each step, the weight being 8 before the first and then each of the values."""
    master = torch.tensor([8.0], requires_grad=True)
    average = MovingAverage([master], config)
    found = [float(average.tensors[0])]
    for step, value in enumerate(values, 1):
        master.data.fill_(value)
        average.update(step)
        found.append(float(average.tensors[0]))
    return found


def test_from_the_first_step() -> None:
    """Decays 2/11, 3/12, 4/13 while they are below that of the settings, here 0.3."""
    first = 8 * 2 / 11 + 4 * 9 / 11
    second = first * 3 / 12
    third = second * 0.3 + 4 * 0.7
    assert averages(EmaConfig(decay=0.3), [4.0, 0.0, 4.0]) == pytest.approx([8.0, first, second, third])


def test_a_copy_until_the_start() -> None:
    first = 2 * 2 / 11 + 4 * 9 / 11
    found = averages(EmaConfig(decay=0.2, start_step=2), [4.0, 2.0, 4.0, 0.0])
    assert found == pytest.approx([8.0, 4.0, 2.0, first, first * 0.2])


def test_an_average_of_long_memory_leaves_the_initial_weights_in_a_short_run() -> None:
    """Of the initial 8 less than a millionth is left after 100 steps; at a constant decay it would be 99 %."""
    assert averages(EmaConfig(decay=0.9999), [0.0] * 100)[-1] < 8e-6


def test_exchanging_twice_is_nothing() -> None:
    masters = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    average = MovingAverage(masters, EmaConfig(decay=0.5))
    masters[0].fill_(5.0)
    average.swap()
    assert (masters[0].tolist(), average.tensors[0].tolist()) == ([1.0, 2.0], [5.0, 5.0])
    average.swap()
    assert (masters[0].tolist(), average.tensors[0].tolist()) == ([5.0, 5.0], [1.0, 2.0])


def test_a_saved_average_continues() -> None:
    """By the step alone: at step 26 of an average from step 20 on the decay is 7/16."""
    average = MovingAverage([torch.zeros(2)], EmaConfig(decay=0.5, start_step=20))
    average.tensors[0].copy_(torch.tensor([4.0, 8.0]))
    average.update(26)
    assert average.tensors[0].tolist() == [1.75, 3.5]
