"""Label-smoothed cross-entropy: the loss of plain training.

Hidden states of padding are dropped before the projection; how many stay is known on the CPU, so no GPU is waited for. An
empty micro-batch passes through the whole model and adds exactly zero to the loss and to every parameter's gradient, so that
every rank runs the same modules whatever it holds.

Where the loss is a mean over sentences, a token weighs 1 / (targets of its sentence), and the denominator is the number of
sentences; how a step is cut into micro-batches then moves nothing either. What is reported besides stays per token.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from dstrain.batch import IGNORE_INDEX, Batch, Size
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.objective import LossOutput
from dstrain.ops.scored_rows import scored_rows
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy
from dstrain.protocols import TeacherForced


class CrossEntropy:
    """Implements `objective.Objective`; the formula is in `ops/token_loss/smoothing.py`."""

    selection = None

    def __init__(self, config: CrossEntropyConfig) -> None:
        self.config = config

    def __call__(self, model: TeacherForced, batch: Batch, selected: Tensor | None = None) -> LossOutput:
        """The sum of losses over the batch's scored labels; sums: `nll`, the same without smoothing and weights."""
        hidden = model(batch.source, batch.target).hidden.flatten(0, 1)  # (B * T, D)
        scored = scored_tokens(batch, self.config)
        reduce = partial(
            linear_cross_entropy,
            labels=scored.labels,
            label_smoothing=self.config.label_smoothing,
            chunk_tokens=self.config.chunk_tokens,
            token_weights=scored.weights,
        )
        loss_sum, nll_sum = model.reduce_projection(hidden.index_select(0, scored.rows), reduce)
        return LossOutput(loss_sum, batch.size, {"nll": nll_sum})

    def denominator(self, size: Size) -> int:
        """Targets or sentences, as `average` says."""
        return size.num_sentences if self.config.average == "sentences" else size.num_targets

    def close(self) -> None:
        """Nothing is open."""


class ScoredTokens(NamedTuple):
    """rows: (n,) their places in the flattened (B * T); labels: (n,); weights: (n,), or None where all are 1."""

    rows: Tensor
    labels: Tensor
    weights: Tensor | None


def scored_tokens(batch: Batch, config: CrossEntropyConfig) -> ScoredTokens:
    """The tokens of a batch that the loss is made of."""
    labels = batch.labels.flatten()
    rows = scored_rows(labels, batch.num_targets)
    weights = None
    if config.average == "sentences":
        lengths = (batch.labels != IGNORE_INDEX).sum(1)  # (B,)
        weights = lengths.reciprocal().index_select(0, rows // batch.labels.shape[1])
    return ScoredTokens(rows, labels.index_select(0, rows), weights)
