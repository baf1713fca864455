"""Teachers at work as a source of signals: whatever computes features and a projection from a batch, one or several.

Features and weights are handed down, never back: the loss is computed while every teacher's projection is still running, for
under ZeRO-3 a weight is whole no longer than that. Teachers run without gradient; the loss runs with it where training does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dstrain.batch import Batch
from dstrain.distillation.feature_plan import require_one_teacher
from dstrain.model_output import ActivationCapture
from dstrain.ops.teacher_signal import DenseSignal, Signal

R = TypeVar("R")
Look = Callable[[Tensor, Tensor], None]
"""Takes features (n, E) and a projection's weight (V, E), over the student's vocabulary."""


class Wanted(NamedTuple):
    """What a distillation asks of its signals.

    on_policy: signals of targets that are not in the data, too. features: what is inside a teacher, too.
    """

    divergence: str
    temperature: float
    on_policy: bool = False
    features: bool = False


class SignalSource(Protocol):
    """Teachers as a distillation objective sees them: at work beside the student, or kept on disk."""

    def require(self, requested: Wanted) -> None:
        """Raise a DstrainError where the signals cannot give it."""
        ...

    def reduce_signal(
        self, batch: Batch, rows: Tensor, reduce: Callable[[Signal], R], capture: ActivationCapture | None = None
    ) -> R:
        """Call `reduce` with the signal for the batch's scored tokens and return what it returns; the signal is not to be kept.

        rows: (n,) places of the scored tokens in the flattened (B * T) labels. record: filled by the teacher's forward, where
        `require` allows features. Under a sharded teacher collective, and then called equally often on every rank.
        """
        ...


class Teacher(Protocol):
    """A model that teaches (`engine.teacher_engine.TeacherEngine`)."""

    def teach(self, batch: Batch, rows: Tensor, look: Look, capture: ActivationCapture | None = None) -> None:
        """Call `look` once for the batch's scored tokens, rows: (n,) places in the flattened (B * T) labels.

        capture: the activations to store.
        """
        ...


class TeacherSignals:
    """Implements `SignalSource` for teachers of the student's vocabulary."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.teachers = list(teachers)

    def require(self, requested: Wanted) -> None:
        """RecipeError for features of several; every divergence is at hand, at every temperature, of any targets."""
        if requested.features:
            require_one_teacher(len(self.teachers))

    def reduce_signal(
        self, batch: Batch, rows: Tensor, reduce: Callable[[Signal], R], capture: ActivationCapture | None = None
    ) -> R:
        """`reduce` of the features and weights of all teachers, inside all their projections."""
        with_grad = torch.is_grad_enabled()
        results: list[R] = []

        def nest(waiting: list[Teacher], features: list[Tensor], weights: list[Tensor]) -> None:
            if waiting:
                waiting[0].teach(batch, rows, lambda f, w: nest(waiting[1:], [*features, f], [*weights, w]), capture)
                return
            with torch.set_grad_enabled(with_grad):
                results.append(reduce(DenseSignal(features, weights)))

        with torch.no_grad():
            nest(self.teachers, [], [])
        return results[0]
