"""Model and objective as one module with one forward: all that the engine sees of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from dstrain.batch import Batch
from dstrain.objectives.objective import LossOutput, Objective
from dstrain.protocols import TeacherForced

_R = TypeVar("_R")


class TrainModule(nn.Module):
    """Model and objective. model: an `nn.Module`, whose parameters are this module's under the prefix `model.`

    objective: one that learns parameters of its own is an `nn.Module` too, and they are this module's under `objective.`
    validation: the objective in evaluation mode; None = the same as in training.
    """

    def __init__(self, model: TeacherForced, objective: Objective, validation: Objective | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.validation = objective if validation is None else validation

    def forward(self, batch: Batch, compute: Callable[[TeacherForced, Batch], _R] | None = None) -> _R | LossOutput:
        """`compute(model, batch)`, called here because under ZeRO-3 parameters are gathered inside this forward only.

        compute: None for the loss, the objective's in training and the validation's in evaluation mode.
        """
        if compute is not None:
            return compute(self.model, batch)
        return (self.objective if self.training else self.validation)(self.model, batch)
