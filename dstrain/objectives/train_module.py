"""Model and objective as one module with one forward: all that the engine sees of them."""

from __future__ import annotations

from torch import nn

from dstrain.batch import Batch
from dstrain.protocols import LossOutput, Objective, TeacherForced


class TrainModule(nn.Module):
    """Batch in, sum of losses out. model: an `nn.Module`, whose parameters are this module's under the prefix `model.`"""

    def __init__(self, model: TeacherForced, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> LossOutput:
        """The objective of the model on one micro-batch."""
        return self.objective(self.model, batch)
