"""Label-smoothed cross-entropy: the loss of plain training.

Hidden states of padding are dropped before the projection; how many stay is known on the CPU, so no GPU is waited for. An
empty micro-batch passes through the whole model and adds exactly zero to the loss and to every parameter's gradient, so that
every rank runs the same modules whatever it holds.
"""

from __future__ import annotations

from functools import partial

from dstrain.batch import Batch
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.ops.linear_cross_entropy import linear_cross_entropy, scored_rows
from dstrain.protocols import LossOutput, TeacherForced


class CrossEntropy:
    """Implements `protocols.Objective`; the formula stands in `ops/linear_cross_entropy.py`."""

    def __init__(self, config: CrossEntropyConfig) -> None:
        self.config = config

    def __call__(self, model: TeacherForced, batch: Batch) -> LossOutput:
        """The sum of losses over the batch's scored labels; sums: `nll`, the same without smoothing."""
        hidden = model(batch.source, batch.target).hidden.flatten(0, 1)  # (B * T, D)
        labels = batch.labels.flatten()
        rows = scored_rows(labels, batch.num_targets)
        reduce = partial(
            linear_cross_entropy,
            labels=labels.index_select(0, rows),
            label_smoothing=self.config.label_smoothing,
            chunk_tokens=self.config.chunk_tokens,
        )
        loss_sum, nll_sum = model.reduce_projection(hidden.index_select(0, rows), reduce)
        return LossOutput(loss_sum, batch.num_targets, {"nll": nll_sum})
