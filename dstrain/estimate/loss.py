"""Bytes of the vocabulary loss on a rank: the gradients that it makes in forward, and the logits of a chunk.

With n scored tokens of E features, V vocabulary entries on the rank, and chunks of c tokens: 4 (n E + V E) for the gradients of
features and weight, kept until the loss's backward pass; 4 c V for the logits; a loss's own temporaries of that size; and, in 16
bits, the gradient of the logits once more in that type. A CPU multiplies 16 bits as float32, of copies of that gradient and of
the weight. The backward pass scales both gradients, in copies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dstrain.estimate.workload import LossKind, MicroBatch, ParallelLayout, Workload
from dstrain.models.config import ModelConfig
from dstrain.ops.chunk_size import resolve_chunk_tokens

_LOGITS: Mapping[LossKind, int] = {"cross_entropy": 1, "r_drop": 3, "sparse_distillation": 2, "dense_distillation": 6}
"""Tensors of the size of a chunk's logits, in float32, that exist at one time."""


@dataclass(frozen=True)
class LossBytes:
    """kept: from forward to the loss's backward pass. workspace: beside it, of a chunk in forward or of copies in backward."""

    kept: float
    workspace: float

    @property
    def peak(self) -> float:
        """The highest of both."""
        return self.kept + self.workspace


def projection_dim(model: ModelConfig) -> int:
    """E: the width of the vocabulary matrix."""
    embedding = model.embedding
    if embedding.output_dim is not None:
        return embedding.output_dim
    is_tied = embedding.tie != "none" and embedding.kind == "factorized" and embedding.sides != "source"
    return embedding.dim if is_tied and embedding.kind == "factorized" else model.model_dim


def has_output_map(model: ModelConfig) -> bool:
    """Whether a linear map, or a tied up-projection, stands between hidden states and the vocabulary matrix."""
    embedding = model.embedding
    is_tied = embedding.tie != "none" and embedding.kind == "factorized" and embedding.sides != "source"
    return is_tied or embedding.output_dim is not None


def loss_bytes(workload: Workload, layout: ParallelLayout) -> LossBytes:
    """Of one micro-batch."""
    scored = MicroBatch.of(workload, layout).scored(workload) / layout.sequence
    width, entries = projection_dim(workload.model), math.ceil(workload.vocabulary.target / layout.tensor)
    trains = workload.adapter is None
    kept = 4.0 * width * (workload.passes * scored + (entries if trains else 0))
    chunk_tokens = resolve_chunk_tokens(workload.chunk_tokens, layout.device, entries)
    chunk = min(chunk_tokens, scored * workload.passes) * entries
    workspace = 4 * chunk * _LOGITS[workload.loss] + 4 * width
    if workload.element_bytes < 4:
        workspace += chunk * workload.element_bytes
        if layout.device == "cpu":
            workspace += 4.0 * (chunk + entries * width)
    scaling = kept * workload.element_bytes / 4 + 4.0 * width * max(workload.passes * scored, entries if trains else 0)
    workspace = max(workspace, scaling)
    teachers = sum(projection_dim(teacher.model) for teacher in workload.teachers)
    return LossBytes(kept, workspace + scored * teachers * workload.element_bytes)
