"""Which tokens learn from the teacher: those that the student finds hardest, within the step or among recent ones.

A token is selected where its negative log-likelihood reaches the gate g, the k-th largest of n values, k = ceil(n rate):

    batch                the n values are those of the optimizer step
    global               ... of a queue, after the step's own values have entered it
    global_by_language   ... of the queue of the sentence's language, the tag that begins its source

These are the predecessor's formulas (Wang et al., ACL 2021, "Selective Knowledge Distillation for NMT"), with its batch read as
the optimizer step over all ranks, on real tokens: padding, validation and values that are not finite enter nowhere. The queue is
first in, first out, never longer than its size and never shorter than it need be.

A gate needs all values of a step before the first loss, so the engine surveys the step: it shows all micro-batches once without
gradient, under the dropout that training will then draw again. It costs one more forward pass of the student. Values of all
ranks are brought into one order that does not depend on who held which sentence, as good as random: so every way to split a
step gives the same queue, and a queue that is shorter than a step keeps a fair sample of it. Selected tokens are settled then and
there; rounding in the second pass cannot move them over the gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dstrain.batch import Batch, sent
from dstrain.distillation.config import BatchSelection, GlobalByLanguageSelection, GlobalSelection
from dstrain.errors import DataError

SelectiveConfig = BatchSelection | GlobalSelection | GlobalByLanguageSelection
ONE_QUEUE = 0
"""The tag of all tokens where languages are not told apart."""


class TokenStatistics(NamedTuple):
    """What is known of scored tokens, (n,) float64 each. order: place in the queue; tag: language."""

    order: Tensor
    nll: Tensor
    tag: Tensor


class Selection:
    """The gates of one step after another, and the queues between them.

    tag_position: where the language tag stands among the ids of a source.
    """

    def __init__(self, config: SelectiveConfig, tag_position: int = 0) -> None:
        self.rate = config.rate
        self.queue_size = None if isinstance(config, BatchSelection) else config.queue_size
        self.by_language = isinstance(config, GlobalByLanguageSelection)
        self.tag_position = tag_position
        self.queues: dict[int, Tensor] = {}
        self._thresholds: dict[int, float] = {}

    def statistics(self, batch: Batch, rows: Tensor, nll: Tensor) -> Tensor:
        """Of the batch's scored tokens. rows: (n,) indices into the flattened (B * T) labels; nll: (n,) -> (n, 3)"""
        width = batch.labels.shape[1]
        sentences = rows // width
        order = _scattered(sent(batch.example_ids, rows.device)[sentences], rows % width)
        tag = torch.full_like(rows, ONE_QUEUE)
        if self.by_language:
            if batch.source is None:
                raise DataError(
                    "objective.selection.kind = global_by_language reads the language from the source, but there is none; choose "
                    "selection: {kind: global}"
                )
            tokens = batch.source.tokens
            tag = tokens[:, min(self.tag_position, tokens.shape[1] - 1)][sentences]  # an empty micro-batch may be narrower
        return torch.stack([order.double(), nll.double(), tag.double()], dim=1)

    def update_queue(self, step: Tensor) -> None:
        """Take in the facts of all tokens of a step, (N, 3) in any order: move the queues and set the gates."""
        statistics = TokenStatistics(*_in_order(step).unbind(1))
        self._thresholds = {}
        for tag in sorted(set(statistics.tag.tolist())):
            values = statistics.nll[(statistics.tag == tag) & statistics.nll.isfinite()]
            if self.queue_size is not None:
                queue = self.queues.get(int(tag), values[:0]).to(values.device)
                values = self.queues[int(tag)] = torch.cat([queue, values])[-self.queue_size :]
            self._thresholds[int(tag)] = threshold(values, self.rate)

    def selected(self, statistics: Tensor) -> Tensor:
        """Which tokens of the step learn from the teacher. facts: (n, 3) -> (n,) bool"""
        found = TokenStatistics(*statistics.unbind(1))
        chosen = torch.zeros_like(found.nll, dtype=torch.bool)
        for tag, value in self._thresholds.items():
            chosen |= (found.tag == tag) & (found.nll >= value)
        return chosen

    def state(self) -> dict[int, Tensor]:
        """The queues by tag, oldest value first."""
        return {tag: queue.cpu() for tag, queue in self.queues.items()}

    def load_state(self, state: Mapping[int, Tensor]) -> None:
        """Take over what `state` gave."""
        self.queues = dict(state)


def threshold(values: Tensor, rate: float) -> float:
    """The k-th largest of n values, k = ceil(n rate); infinite where there are none."""
    number = len(values)
    count = math.ceil(number * rate - 1e-9)  # 30 x 0.1 is 3, though not in binary
    return values.kthvalue(number - count + 1).values.item() if number else math.inf


def _scattered(examples: Tensor, positions: Tensor) -> Tensor:
    """A number below 2**52 for each token of the data set, without regard to where in it the token stands. (n,) int64 each"""
    mixed = examples * -0x61C8864680B583EB + positions * -0x3D4D51C2D82B14B1
    mixed = (mixed ^ (mixed >> 29)) * -0x40A7B892E31B1A47
    return (mixed ^ (mixed >> 32)) & (2**52 - 1)


def _in_order(statistics: Tensor) -> Tensor:
    """Rows by order; the same order whatever the order they came in. (N, 3)"""
    for column in (2, 1, 0):
        statistics = statistics[statistics[:, column].argsort(stable=True)]
    return statistics
