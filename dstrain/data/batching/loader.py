"""Batches of one rank: endless for training, made ahead in the background; once through for evaluation.

Every rank plans every step, which is cheap and needs no communication, and reads only the examples of its own micro-batches.
The position in the plan is all the state: a loader started at (epoch, step) goes on as the interrupted one would have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Protocol

import numpy as np
import torch

from dstrain.batch import Batch
from dstrain.data.batching.collate import Collator, TokenBlock
from dstrain.data.batching.permutation import IntArray
from dstrain.data.batching.plan import PlannedStep, StepPlan, evaluation_batches, micro_batches
from dstrain.data.batching.prefetch import Prefetcher
from dstrain.data.lengths import ExampleLengths
from dstrain.data.prepared.dataset import Example

EVALUATION_EPOCH = 0
"""Training counts epochs from 1: what is evaluated is the same whenever it is, noise included."""


class Examples(Protocol):
    """Examples by row: a `Dataset` has them as they are, `TaskExamples` make them; `BlockExamples` have blocks by number."""

    @property
    def lengths(self) -> ExampleLengths:
        """Of all rows."""
        ...

    def read(self, epoch: int, rows: IntArray) -> Sequence[Example] | Sequence[TokenBlock]:
        """Some rows as they are in an epoch."""
        ...


class Steps(Protocol):
    """All steps from some position in the plan on, epoch after epoch, each with this rank's micro-batches."""

    def __iter__(self) -> Iterator[tuple[PlannedStep, Sequence[Batch]]]:
        """The steps in order."""
        ...

    def close(self) -> None:
        """No more are needed."""
        ...


class TrainLoader(Prefetcher[tuple[PlannedStep, list[Batch]]]):
    """The steps of a plan from `start` = (epoch, step in the epoch) on, each with this rank's micro-batches, without end.

    data_rank, data_size: this rank among those that share out the examples; all get equally many micro-batches for a step.
    device: the GPU that they go to: they, or the share of this sequence rank, are then in pinned memory. Close it, or use it as a
    context manager.
    """

    def __init__(
        self,
        examples: Examples,
        plan: StepPlan,
        collator: Collator,
        *,
        data_rank: int = 0,
        data_size: int = 1,
        start: tuple[int, int] = (0, 0),
        prefetch: int = 8,
        device: torch.device | None = None,
        sequence_rank: int = 0,
        sequence_size: int = 1,
    ) -> None:
        def steps() -> Iterator[tuple[PlannedStep, list[Batch]]]:
            if device is not None:
                torch.cuda.set_device(device)  # each thread has its own, at first GPU 0: its pinned memory would be that one's
            first_epoch, first_step = start
            for epoch in count(first_epoch):
                for step in plan.epoch(epoch, first_step if epoch == first_epoch else 0):
                    groups = micro_batches(
                        step.examples,
                        *plan.lengths.of(epoch, step.examples),
                        plan.config.max_tokens,
                        data_size,
                        kind=plan.kind,
                        packed=collator.packed is not None,
                    )
                    batches = [collator(examples.read(epoch, group), group) for group in groups[data_rank::data_size]]
                    yield step, batches if device is None else [batch.pinned(sequence_rank, sequence_size) for batch in batches]

        super().__init__(steps(), prefetch)


def evaluation_loader(
    examples: Examples,
    max_tokens: int,
    collator: Collator,
    *,
    data_rank: int = 0,
    data_size: int = 1,
) -> Iterator[Batch]:
    """This rank's share of all examples, each exactly once over the ranks, in batches of similar lengths.

    Every rank gets equally many batches; if they do not go round, the last ones are empty micro-batches.
    """
    lengths = examples.lengths.of(EVALUATION_EPOCH, np.arange(len(examples.lengths)))
    groups = evaluation_batches(*lengths, max_tokens, kind=collator.kind)
    groups += [groups[0][:0]] * (-len(groups) % data_size) if groups else []
    for group in groups[data_rank::data_size]:
        yield collator(examples.read(EVALUATION_EPOCH, group), group)
