"""Model and objective as one module with one forward: all that the engine sees of them."""

from __future__ import annotations

from torch import nn

from dstrain.batch import Batch
from dstrain.objectives.objective import LossOutput, Objective
from dstrain.protocols import TeacherForced


class TrainModule(nn.Module):
    """Batch in, sum of losses out. model: an `nn.Module`, whose parameters are this module's under the prefix `model.`

    objective: one that learns parameters of its own is an `nn.Module` too, and they are this module's under `objective.`
    validation: the objective in evaluation mode; None = the same as in training.
    """

    def __init__(self, model: TeacherForced, objective: Objective, validation: Objective | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.validation = objective if validation is None else validation

    def forward(self, batch: Batch) -> LossOutput:
        """The objective of the model on one micro-batch."""
        objective = self.objective if self.training else self.validation
        return objective(self.model, batch)
