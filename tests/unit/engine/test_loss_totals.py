"""Losses and metrics of micro-batches and ranks that report different names: added up by name, divided by their own counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dstrain.batch import Metrics, Size
from dstrain.engine.loss_totals import LossReducer, LossTotals, Total
from dstrain.objectives.objective import LossOutput
from tests.unit.checkpoint.ranks import ThreadRanks, on_ranks
from tests.unit.training.fakes import ONE_PROCESS


def output(number: int, **sums: float) -> LossOutput:
    """Of `number` targets in one sentence, with a loss of 10 per target."""
    tensors = {name: torch.tensor(value) for name, value in sums.items()}
    return LossOutput(torch.tensor(10.0 * number), Size(number, 1), Metrics.over(number, tensors))


def totals(*outputs: LossOutput) -> Total:
    added = LossTotals()
    for each in outputs:
        added.add(each)
    total, further = added.read(torch.tensor([0.1, math.inf]))
    assert further == [float(torch.tensor(0.1)), math.inf], "further numbers arrive in the same copy, as they are"
    return total


def test_two_micro_batches_of_different_names_give_both() -> None:
    found = LossReducer(ONE_PROCESS)(totals(output(4, nll=8.0, kd=2.0), output(6, nll=1.0, on_policy_kd=3.0)))
    assert found.loss_sum == 100.0
    assert found.size == Size(10, 2)
    assert found.metrics.means() == {"nll": 0.9, "kd": 0.5, "on_policy_kd": 0.5}


def test_the_order_of_names_in_a_micro_batch_does_not_matter() -> None:
    found = LossReducer(ONE_PROCESS)(totals(output(4, nll=8.0, kd=2.0), output(6, kd=1.0, nll=3.0)))
    assert found.metrics == Metrics({"nll": 11.0, "kd": 3.0}, {"nll": 10, "kd": 10})


def test_an_empty_micro_batch_reports_nothing() -> None:
    found = LossReducer(ONE_PROCESS)(totals(output(4, nll=8.0), output(0, kd=0.0)))
    assert found.metrics == Metrics({"nll": 8.0}, {"nll": 4})
    assert found.size == Size(4, 2)


class Counted(ThreadRanks):
    """Counts the collectives."""

    def __init__(self, ranks: ThreadRanks) -> None:
        super().__init__(ranks.rank, ranks.size, ranks._meeting)
        self.calls = 0

    def gather_objects(self, value: Any) -> list[Any]:
        self.calls += 1
        return super().gather_objects(value)


STEPS = [
    [output(4, nll=8.0), output(6, kl=1.0)],
    [output(5, nll=1.0), output(5, kl=2.0)],
    [output(3, kl=3.0), output(7, kl=4.0)],
    [output(2, nll=6.0), output(8, agreement=2.0)],
]
"""Of two ranks, one micro-batch each."""


def test_ranks_with_different_names_agree_on_them_once() -> None:
    def run(ranks: ThreadRanks) -> list[tuple[Total, int]]:
        counted = Counted(ranks)
        reduce, found = LossReducer(counted), []
        for step in STEPS:
            before = counted.calls
            found.append((reduce(totals(step[ranks.rank])), counted.calls - before))
        return found

    first, second = on_ranks(2, run)
    assert first == second, "the same on every rank"
    assert [total.metrics.means() for total, _ in first] == [
        {"nll": 2.0, "kl": pytest.approx(1 / 6)},
        {"nll": 0.2, "kl": 0.4},
        {"kl": 0.7},
        {"nll": 3.0, "agreement": 0.25},
    ]
    assert [collectives for _, collectives in first] == [3, 1, 1, 3]
    assert all(total.loss_sum == 100.0 and total.size == Size(10, 2) for total, _ in first)
