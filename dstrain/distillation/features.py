"""Losses between activations of student and teacher: hidden states and attention probabilities of the same tokens.

A feature is the mean over its pairs of layers of a distance (`ops/distance.py`) at each position, summed over

    decoder, cross   the scored target tokens
    encoder          the source tokens, each weighted by targets / sources of its example, so that an example adds its mean once
                     for each of its target tokens

and never over padding. So it is a sum over examples like every other loss, and the step's one division by target tokens makes a
mean of it; padding, packing, other rows, micro-batches and the number of ranks do not change it. It is reported before its
weight.

Attention is averaged over the heads first, because heads of student and teacher do not correspond and may differ in number.
TinyBERT (Jiao et al. 2020) and MiniLM (Wang et al. 2020) pair the heads by number, which requires equally many.

If the teacher is wider or narrower, one matrix for all layers of a feature maps the student's hidden states to its width, as
in TinyBERT. It belongs to the objective: optimizer and checkpoints hold it, bundles do not. Its initial values depend on the seed
and the feature's name only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dstrain.batch import Batch
from dstrain.distillation.feature_plan import PlannedFeature
from dstrain.model_output import ActivationCapture, Tap
from dstrain.nn.linear import Linear
from dstrain.ops.distance import DISTANCES
from dstrain.seeding import derive_seed
from dstrain.wire import sent


class FeatureLoss(nn.Module):
    """One feature. name: under which it is reported."""

    def __init__(self, plan: PlannedFeature, seed: int) -> None:
        super().__init__()
        config = plan.config
        self.name = f"feature_{config.side}_{config.kind}_{config.loss}"
        self.weight = config.weight
        self.side = config.side
        self.teacher_kind = plan.teacher_kind
        self.distance = DISTANCES[config.loss]
        self.taps = [tuple(Tap(config.kind, config.side, layer) for layer in pair) for pair in plan.pairs]
        self.projection: nn.Module = nn.Identity()
        if config.kind == "hidden_states" and plan.student_dim != plan.teacher_dim:
            self.projection = _projection(plan, derive_seed(seed, f"initialize {self.name}"))

    def forward(self, batch: Batch, student: ActivationCapture, teacher: ActivationCapture) -> Tensor:
        """The sum over the batch, with gradient."""
        weights = source_weights(batch) if self.side == "encoder" else None
        index, teacher_index = batch.targets.index, batch.for_kind(self.teacher_kind).targets.index
        total = torch.zeros((), device=index.device)
        for tap, teacher_tap in self.taps:
            values, goals = student.captured[tap].flatten(0, -2), teacher.captured[teacher_tap].flatten(0, -2)
            if weights is None:
                values, goals = values.index_select(0, index), goals.index_select(0, teacher_index)
            distances = self.distance(self.projection(values).float(), goals.float())  # (n,) or (B * S or N,)
            total = total + (distances if weights is None else distances * weights).sum()
        return total / len(self.taps)


class FeatureLosses(nn.Module):
    """All features of a distillation."""

    def __init__(self, plans: Sequence[PlannedFeature], *, seed: int) -> None:
        super().__init__()
        self.losses = nn.ModuleList(FeatureLoss(plan, seed) for plan in plans)
        taps = [pair for loss in self.losses for pair in cast("FeatureLoss", loss).taps]
        self.student_taps = frozenset(tap for tap, _ in taps)
        self.teacher_taps = frozenset(tap for _, tap in taps)

    def forward(self, batch: Batch, student: ActivationCapture, teacher: ActivationCapture) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, with gradient, and each feature's own by name, detached."""
        total, sums = torch.zeros((), device=batch.targets.index.device), {}
        for loss in cast("list[FeatureLoss]", list(self.losses)):
            value = loss(batch, student, teacher)
            total = total + loss.weight * value
            sums[loss.name] = value.detach()
        return total, sums


def source_weights(batch: Batch) -> Tensor:
    """The weight of each source token, its example's targets / sources; 0 for padding. (B * S or N,) float32"""
    tokens, examples = (batch.whole or batch).reading.tokens, batch.examples
    length = examples.source_length  # (b,)
    first = length.cumsum(0) - length
    index = torch.arange(int(length.sum())) + (examples.source_start - first).repeat_interleave(length)
    weights = torch.zeros(tokens.numel())
    weights[index] = (examples.target_length / length).repeat_interleave(length)
    return sent(weights[batch.reading.own], batch.reading.tokens.device)


def _projection(plan: PlannedFeature, seed: int) -> Linear:
    """With the initial values of torch's own linear maps."""
    projection = Linear(plan.student_dim, plan.teacher_dim, bias=False)
    bound = 1 / math.sqrt(plan.student_dim)
    with torch.no_grad():
        projection.weight.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    return projection
