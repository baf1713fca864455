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
    assert averages(EmaConfig(decay=0.75), [4.0, 0.0, 4.0]) == pytest.approx([8.0, 7.0, 5.25, 4.9375])


def test_a_copy_until_the_start() -> None:
    assert averages(EmaConfig(decay=0.5, start_step=2), [4.0, 2.0, 4.0, 0.0]) == [8.0, 4.0, 2.0, 3.0, 1.5]


def test_exchanging_twice_is_nothing() -> None:
    masters = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    average = MovingAverage(masters, EmaConfig(decay=0.5))
    masters[0].fill_(5.0)
    average.swap()
    assert (masters[0].tolist(), average.tensors[0].tolist()) == ([1.0, 2.0], [5.0, 5.0])
    average.swap()
    assert (masters[0].tolist(), average.tensors[0].tolist()) == ([5.0, 5.0], [1.0, 2.0])


def test_a_saved_average_continues() -> None:
    average = MovingAverage([torch.zeros(2)], EmaConfig(decay=0.5))
    average.tensors[0].copy_(torch.tensor([4.0, 8.0]))
    average.update(1)
    assert average.tensors[0].tolist() == [2.0, 4.0]
