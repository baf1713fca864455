"""What the engine knows of an objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from dstrain.batch import Batch, Size
from dstrain.protocols import TeacherForced


class LossOutput(NamedTuple):
    """Sums over one micro-batch, and how much it holds.

    loss_sum: () with gradient, to be divided by the objective's `denominator`. sums: further () sums over its scored tokens to
    report, detached; `nll` is one of them.
    """

    loss_sum: Tensor
    size: Size
    sums: dict[str, Tensor]


class Objective(Protocol):
    """Turns hidden states and labels into a sum of losses."""

    def __call__(self, model: TeacherForced, batch: Batch) -> LossOutput:
        """The sum of losses over the batch's scored labels, with gradient."""
        ...

    def denominator(self, size: Size) -> int:
        """What the loss sums of a step or a split of this size are divided by, once and together."""
        ...


@runtime_checkable
class Surveying(Protocol):
    """An objective that weighs each token of a step against all others, so that it must see them before the first loss.

    `distillation.objective.SelectiveDistillation` says what the engine owes it.
    """

    def survey(self, gather: Callable[[Tensor], Tensor], /) -> AbstractContextManager[None]:
        """Calls inside are looks at the micro-batches of a step; collective at its end."""
        ...

    def state(self) -> dict[int, Tensor]:
        """What the next step needs of those before, the same on every rank."""
        ...

    def load_state(self, state: Mapping[int, Tensor], /) -> None:
        """Take over what `state` gave."""
        ...
