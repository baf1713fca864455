"""The interface of an objective for the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from dstrain.batch import Batch, Metrics, Size
from dstrain.protocols import TeacherForced


class LossOutput(NamedTuple):
    """Sums over one micro-batch, and how much it holds.

    loss_sum: () with gradient, to be divided by the objective's `denominator`. metrics: further sums to report, over its targets;
    names may differ from one micro-batch to the next.
    """

    loss_sum: Tensor
    size: Size
    metrics: Metrics[Tensor]


class TokenSelection(Protocol):
    """Chooses among all tokens of a step, over all ranks, those that a loss treats in a special way.

    The engine runs `scan` on every micro-batch before the first loss, passes the result to `select`, and its result to
    the objective's call with the same micro-batch.
    """

    def scan(self, model: TeacherForced, batch: Batch) -> Tensor:
        """Statistics of the batch's n scored tokens, (n, ...); called without gradient."""
        ...

    def select(self, own: Sequence[Tensor], step: Tensor) -> list[Tensor]:
        """The selected tokens of each micro-batch, (n,) bool.

        own: the statistics of this rank's micro-batches. step: (N, ...), those of all micro-batches of all ranks.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """State of the next step, by name, the same on every rank."""
        ...

    def load_state(self, state: Mapping[str, Tensor], /) -> None:
        """Continue from what `state` returned."""
        ...


class Objective(Protocol):
    """Turns hidden states and labels into a sum of losses."""

    @property
    def selection(self) -> TokenSelection | None:
        """The selector of a step's tokens; None if it needs no second pass."""
        ...

    def __call__(self, model: TeacherForced, batch: Batch, selected: Tensor | None = None) -> LossOutput:
        """The sum of losses over the batch's scored labels, with gradient. selected: as `selection` chose, None for all."""
        ...

    def denominator(self, size: Size) -> int:
        """The divisor of the loss sums of a step or a split of this size, once and together."""
        ...

    def close(self) -> None:
        """Release its resources."""
        ...
