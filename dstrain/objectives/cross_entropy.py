"""Label-smoothed cross-entropy: the loss of plain training.

Only the hidden states of scored tokens reach the projection. An empty micro-batch passes through the whole model and adds exactly
zero to the loss and to every parameter's gradient, so that every rank runs the same modules whatever it holds.

If the loss is a mean over sentences, a token weighs 1 / (targets of its sentence), and the denominator is the number of
sentences; how a step is cut into micro-batches then changes nothing either. The metrics stay per token.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dstrain.batch import Batch, Size
from dstrain.model_output import ActivationCapture
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.objective import LossOutput
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy
from dstrain.protocols import TeacherForced


class CrossEntropy:
    """Implements `objective.Objective`; the formula is in `ops/token_loss/smoothing.py`."""

    selection = None

    def __init__(self, config: CrossEntropyConfig) -> None:
        self.config = config

    def __call__(self, model: TeacherForced, batch: Batch, selected: Tensor | None = None) -> LossOutput:
        """The sum of losses over the batch's targets; metrics: `nll`, without smoothing and weights, in all and by corpus."""
        reduce = partial(
            linear_cross_entropy,
            labels=batch.targets.labels,
            label_smoothing=self.config.label_smoothing,
            chunk_tokens=self.config.chunk_tokens,
            token_weights=loss_weight(batch, self.config),
        )
        loss_sum, nll = model.reduce_projection(target_hidden(model, batch), reduce)
        return LossOutput(loss_sum, batch.size, batch.nll_metrics(nll))

    def denominator(self, size: Size) -> int:
        """Targets or sentences, by `average`."""
        return size.num_sentences if self.config.average == "sentences" else size.num_targets

    def close(self) -> None:
        """Nothing is open."""


def target_hidden(model: TeacherForced, batch: Batch, capture: ActivationCapture | None = None) -> Tensor:
    """Features of the batch's targets for the projection, (n, D). capture: the activations to store."""
    hidden = model(batch.source, batch.target, capture).hidden.flatten(0, -2)  # (B * T or N, D)
    return hidden.index_select(0, batch.targets.index)


def loss_weight(batch: Batch, config: CrossEntropyConfig) -> Tensor | None:
    """The factor of each target's loss, (n,); None if all weigh 1."""
    return batch.targets.weight if config.average == "sentences" else None
