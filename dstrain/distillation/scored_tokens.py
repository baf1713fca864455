"""The scored tokens of a batch as a model sees them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dstrain.batch import Batch
from dstrain.model_output import ActivationCapture
from dstrain.ops.scored_rows import scored_rows
from dstrain.protocols import TeacherForced


class Scored(NamedTuple):
    """hidden: (n, D), what the projection reads; rows: (n,) indices into the flattened (B * T) labels; labels: (n,)."""

    hidden: Tensor
    rows: Tensor
    labels: Tensor


def scored_tokens(model: TeacherForced, batch: Batch, capture: ActivationCapture | None = None) -> Scored:
    """Hidden states and labels of the scored tokens. capture: the activations to store."""
    hidden, labels = model(batch.source, batch.target, capture).hidden.flatten(0, 1), batch.labels.flatten()
    rows = scored_rows(labels, batch.num_targets)
    return Scored(hidden.index_select(0, rows), rows, labels.index_select(0, rows))
