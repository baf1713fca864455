"""Where a distillation gets its teacher's signal from: online teachers beside the student, or a store on disk.

A signal is valid while its context is open: under ZeRO-3 the weight of a teacher's projection is whole no longer than that.
Teachers run without gradient; the loss inside the context runs with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple, Protocol

from torch import Tensor

from dstrain.batch import Batch
from dstrain.distillation.feature_plan import require_one_teacher
from dstrain.model_output import ActivationCapture
from dstrain.ops.teacher_signal import DenseSignal, Signal


class SignalRequest(NamedTuple):
    """The requirements of a distillation on its source of signals.

    on_policy: signals of targets that are not in the data, too. features: activations of the teacher, too.
    """

    divergence: str
    temperature: float
    on_policy: bool = False
    features: bool = False


class SignalSource(Protocol):
    """Teachers as a distillation objective sees them."""

    def require(self, request: SignalRequest) -> None:
        """Raise a DstrainError if the source cannot give it."""
        ...

    def open(self, batch: Batch, capture: ActivationCapture | None = None) -> AbstractContextManager[Signal]:
        """The signal of the batch's targets, valid inside the context.

        capture: filled by the teacher's forward, if `require` allows features. Collective under a sharded teacher: every rank
        opens equally often.
        """
        ...

    def close(self) -> None:
        """Release the teachers."""
        ...


class Teacher(Protocol):
    """A model that computes beside the student (`engine.teacher_engine.TeacherEngine`)."""

    def open(self, batch: Batch, capture: ActivationCapture | None = None) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        """Features (n, E) of the targets and the projection's weight (V, E) over the student's vocabulary."""
        ...

    def close(self) -> None:
        """Release the model."""
        ...


class TeacherSignals:
    """Implements `SignalSource` with teachers of the student's vocabulary; several are an ensemble."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.teachers = list(teachers)

    def require(self, request: SignalRequest) -> None:
        """RecipeError for features of several teachers; every divergence is possible, at every temperature, of any targets."""
        if request.features:
            require_one_teacher(len(self.teachers))

    @contextmanager
    def open(self, batch: Batch, capture: ActivationCapture | None = None) -> Iterator[DenseSignal]:
        """One entry a teacher; each runs its body and keeps its projection's weight gathered until the context ends."""
        with ExitStack() as stack:
            opened = [stack.enter_context(teacher.open(batch, capture)) for teacher in self.teachers]
            yield DenseSignal([features for features, _ in opened], [weight for _, weight in opened])

    def close(self) -> None:
        """Release all teachers."""
        for teacher in self.teachers:
            teacher.close()
