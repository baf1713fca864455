"""Losses and metrics of many micro-batches, then of all ranks: added up by name, divided nowhere.

Ranks may report different names in one step, for they hold different micro-batches. Every rank keeps the same list of names and
sends its numbers in that order. A rank with a name that is not in the list says so in the same collective; all ranks then gather
the new names once and send again. So a step costs one collective, and the first step of a new name three.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dstrain.batch import Metrics, Size
from dstrain.objectives.objective import LossOutput
from dstrain.protocols import Ranks


class Total(NamedTuple):
    """loss_sum: not divided yet; size: of all micro-batches together."""

    loss_sum: float
    size: Size
    metrics: Metrics[float]


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, the same on every rank.

    step: number of the step, from 1. loss: nats, the step's loss_sum divided by `denominator`, which is num_targets where the
    loss is a mean over tokens. grad_norm: global L2 norm before clipping. learning_rate: the one this step used. skipped: the
    update was not applied (fp16 overflow). metrics: sums and counts by name, each over the micro-batches that report it.
    """

    step: int
    loss: float
    num_targets: int
    denominator: int
    grad_norm: float
    learning_rate: float
    skipped: bool = False
    metrics: Metrics[float] = field(default_factory=Metrics)


class LossTotals:
    """Adds up the outputs of this rank's micro-batches in float64, without waiting for a GPU."""

    def __init__(self) -> None:
        self._size = Size(0, 0)
        self._counts: Counter[str] = Counter()
        self._sums: dict[tuple[str, ...], Tensor] = {}
        """By the names of a micro-batch: its loss and its metrics in one vector."""

    def add(self, output: LossOutput) -> None:
        """One more micro-batch."""
        names, metrics = tuple(output.metrics.sums), output.metrics
        values = torch.stack([output.loss_sum.detach(), *metrics.sums.values()]).double()
        self._sums[names] = self._sums[names] + values if names in self._sums else values
        self._counts.update(metrics.counts)
        self._size = Size(self._size.num_targets + output.size.num_targets, self._size.num_sentences + output.size.num_sentences)

    def read(self, *further: Tensor) -> tuple[Total, list[float]]:
        """The totals so far, and further numbers (n,) of the device; waits for it, once."""
        parts = [*self._sums.values(), *(numbers.double() for numbers in further)]
        numbers = iter(torch.cat(parts).tolist() if parts else ())
        loss_sum, metrics = 0.0, Metrics[float]()
        for names in self._sums:
            loss_sum += next(numbers)
            metrics = metrics + Metrics({name: next(numbers) for name in names})
        return Total(loss_sum, self._size, Metrics(metrics.sums, dict(self._counts))), list(numbers)


class LossReducer:
    """Adds up the totals of all ranks. Every rank of `ranks` has one and calls it equally often."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._names: list[str] = []

    def __call__(self, own: Total) -> Total:
        """The same on every rank. own: of this rank. Collective."""
        while True:
            sums = [own.metrics.sums.get(name, 0.0) for name in self._names]
            counts = [float(own.metrics.counts.get(name, 0)) for name in self._names]
            has_new = float(not own.metrics.sums.keys() <= set(self._names))
            reduced = self._ranks.all_reduce_sums([own.loss_sum, *own.size, *sums, *counts, has_new])
            if not reduced[-1]:
                break
            gathered = self._ranks.gather_objects(list(own.metrics.sums))
            self._names = list(dict.fromkeys([*self._names, *(name for names in gathered for name in names)]))
        loss_sum, num_targets, num_sentences, *numbers = reduced[:-1]
        by_name = zip(self._names, numbers[: len(self._names)], numbers[len(self._names) :], strict=True)
        reported = [(name, value, int(count)) for name, value, count in by_name if count]
        metrics = Metrics({name: value for name, value, _ in reported}, {name: count for name, _, count in reported})
        return Total(loss_sum, Size(int(num_targets), int(num_sentences)), metrics)
