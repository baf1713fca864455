"""Which tokens learn from the teacher: those that the student finds hardest, within the step or among recent ones.

A token is selected if its negative log-likelihood reaches a threshold, the k-th largest of n values, k = ceil(n rate):

    batch                the n values are those of the optimizer step
    global               ... of a queue, after the step's own values have entered it
    global_by_language   ... of the queue of the sentence's language, the tag that begins its source

These are the predecessor's formulas (Wang et al., ACL 2021, "Selective Knowledge Distillation for NMT"), with its batch read as
the optimizer step over all ranks, on real tokens: padding, validation and values that are not finite enter nowhere. The queue is
first in, first out, never longer than its size and never shorter than it need be.

A threshold needs all values of a step before the first loss. So the engine scans the step: it runs `scan` on all micro-batches
without gradient, under the dropout that training will then draw again, and passes the statistics of all ranks to `select`. It
costs one more forward pass of the student. The values of all ranks are sorted into a pseudo-random order that does not depend on
which rank held which sentence: so every way to split a step gives the same queue, and a queue that is shorter than a step keeps
an unbiased sample of it. The selection is final; rounding in the second pass cannot move a token over the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dstrain.batch import Batch
from dstrain.config_base import ChunkTokens
from dstrain.distillation.config import BatchSelection, GlobalByLanguageSelection, GlobalSelection
from dstrain.objectives.cross_entropy import target_hidden
from dstrain.ops.token_loss.cross_entropy import linear_nll
from dstrain.protocols import TeacherForced
from dstrain.wire import sent

SelectiveConfig = BatchSelection | GlobalSelection | GlobalByLanguageSelection
ONE_QUEUE = 0
"""The tag of all tokens if languages are not distinguished."""


class TokenStatistics(NamedTuple):
    """Of scored tokens, (n,) float64 each. order: sort key of the queue; nll; tag: the queue, that of the language."""

    order: Tensor
    nll: Tensor
    tag: Tensor


class Selection:
    """Implements `objectives.objective.TokenSelection`. Between steps it holds the queues and nothing else.

    chunk_tokens: positions whose logits exist at one time. tag_position: index of the language tag in a source.
    """

    def __init__(self, config: SelectiveConfig, *, chunk_tokens: ChunkTokens = "auto", tag_position: int = 0) -> None:
        self.rate = config.rate
        self.queue_size = None if isinstance(config, BatchSelection) else config.queue_size
        self.by_language = isinstance(config, GlobalByLanguageSelection)
        self.chunk_tokens = chunk_tokens
        self.tag_position = tag_position
        self.queues: dict[int, Tensor] = {}

    def scan(self, model: TeacherForced, batch: Batch) -> Tensor:
        """Statistics of the batch's targets under the present weights, (n, 3)."""
        loss = partial(linear_nll, labels=batch.targets.labels, chunk_tokens=self.chunk_tokens)
        return self.statistics(batch, model.reduce_projection(target_hidden(model, batch), loss))

    def select(self, own: Sequence[Tensor], step: Tensor) -> list[Tensor]:
        """Which tokens of a step learn from the teacher; the step's values enter the queues.

        own: (n, 3) statistics of each of this rank's micro-batches. step: (N, 3) those of all ranks, in any order. Returns (n,)
        bool for each of `own`.
        """
        thresholds = self._thresholds(TokenStatistics(*_in_order(step).unbind(1)))
        return [_reaching(thresholds, TokenStatistics(*statistics.unbind(1))) for statistics in own]

    def statistics(self, batch: Batch, nll: Tensor) -> Tensor:
        """Of the batch's targets. nll: (n,) -> (n, 3)"""
        targets, examples = batch.targets, batch.examples
        order = sent(_scattered(targets.example_id, targets.position), nll.device)
        tag = torch.full_like(order, ONE_QUEUE)
        if self.by_language:
            position = torch.minimum(torch.tensor(self.tag_position), examples.source_length - 1)
            tokens = (batch.whole or batch).reading.tokens.flatten()  # a share may lack the tag
            index = sent((examples.source_start + position)[targets.segment], tokens.device)
            tag = tokens.index_select(0, index).to(nll.device)
        return torch.stack([order.double(), nll.double(), tag.double()], dim=1)

    def _thresholds(self, step: TokenStatistics) -> dict[int, Tensor]:
        """By tag, () each, after the step's values have entered the queues. Waits once for a GPU: for the number of each."""
        is_finite = step.nll.isfinite()
        tags, finite = torch.stack([step.tag, is_finite.double()]).cpu()
        known, entering = tags.long().bincount(), tags.long().bincount(finite)
        thresholds = {}
        for tag in known.nonzero()[:, 0].tolist():
            index = torch.nonzero_static((step.tag == tag) & is_finite, size=int(entering[tag]))[:, 0]
            values = step.nll[index]
            if self.queue_size is not None:
                queue = self.queues.get(tag, values[:0]).to(values.device)
                values = self.queues[tag] = torch.cat([queue, values])[-self.queue_size :]
            thresholds[tag] = threshold(values, self.rate)
        return thresholds

    def state(self) -> dict[str, Tensor]:
        """`queue.{tag}` -> (n,) float64, oldest value first."""
        return {f"queue.{tag}": queue for tag, queue in self.queues.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        self.queues = {int(name.removeprefix("queue.")): queue for name, queue in state.items()}


def threshold(values: Tensor, rate: float) -> Tensor:
    """The k-th largest of n values, k = ceil(n rate); infinite if there are none. (n,) -> ()"""
    number = len(values)
    count = math.ceil(number * rate - 1e-9)  # 30 x 0.1 is 3, though not in binary
    return values.kthvalue(number - count + 1).values if number else values.new_full((), math.inf)


def _reaching(thresholds: Mapping[int, Tensor], statistics: TokenStatistics) -> Tensor:
    """(n,) bool"""
    selected = torch.zeros_like(statistics.nll, dtype=torch.bool)
    for tag, value in thresholds.items():
        selected |= (statistics.tag == tag) & (statistics.nll >= value)
    return selected


def _scattered(examples: Tensor, positions: Tensor) -> Tensor:
    """A hash below 2**52 of each token of the data set, whatever batch it is in. (n,) int64 each"""
    mixed = examples * -0x61C8864680B583EB + positions * -0x3D4D51C2D82B14B1
    mixed = (mixed ^ (mixed >> 29)) * -0x40A7B892E31B1A47
    return (mixed ^ (mixed >> 32)) & (2**52 - 1)


def _in_order(statistics: Tensor) -> Tensor:
    """Rows by order; the same order whatever the order they came in. (N, 3)"""
    for column in (2, 1, 0):
        statistics = statistics[statistics[:, column].argsort(stable=True)]
    return statistics
