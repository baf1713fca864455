"""How far a store's gradient points away from that of the whole distribution: the test of a store on one's own teacher.

For the same tokens the student's gradient is computed twice, over all its parameters: from the stored values, and from all of the
teacher's probabilities. An unbiased store has an angle that falls like one over the root of the number of tokens; the angle of a
biased one stays, however many there are. The loss is the forward divergence at the store's temperature, by the very op that
trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dstrain.batch import Batch
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.permutation import Permutation
from dstrain.data.prepared.dataset import Dataset
from dstrain.objectives.cross_entropy import target_hidden
from dstrain.ops.divergence import Divergence
from dstrain.ops.teacher_signal import DenseSignal, KeptSignal
from dstrain.ops.token_loss.distillation import DistillationTerms, linear_distillation
from dstrain.protocols import TeacherForced

ROWS_AT_A_TIME = 4096
"""Of the random order."""


class Angle(NamedTuple):
    """degrees: between both gradients of so many tokens; norm_ratio: length of the store's to that of the whole."""

    tokens: int
    degrees: float
    norm_ratio: float


def gradient_angles(
    student: TeacherForced,
    parameters: Sequence[Tensor],
    teacher: TeacherForced,
    signal_of: Callable[[Batch], KeptSignal],
    batches: Iterable[Batch],
    *,
    tokens: Sequence[int],
    temperature: float,
) -> Iterator[Angle]:
    """The angle after at least so many tokens, for each number in ascending order, or fewer where `batches` end.

    parameters: those of the student. Both models are in evaluation mode and on the device of the batches.
    """
    sums = [[torch.zeros_like(parameter) for parameter in parameters] for _ in range(2)]
    remaining, done = sorted(tokens), 0
    for batch in batches:
        gradients = _both_gradients(student, parameters, teacher, batch, signal_of(batch), temperature=temperature)
        for total, gradient in zip(sums, gradients, strict=True):
            torch._foreach_add_(total, gradient)
        done += batch.num_targets
        while remaining and done >= remaining[0]:
            yield _angle(done, *sums)
            remaining.pop(0)
        if not remaining:
            return
    if done:
        yield _angle(done, *sums)


def random_batches(dataset: Dataset, max_tokens: int, collator: Collator, *, seed: int = 1) -> Iterator[Batch]:
    """The rows of a split in random order, in batches of at most `max_tokens` padded tokens, once through."""
    group: list[int] = []
    widest = 0
    for row in _shuffled(len(dataset), seed):
        width = max(widest, int(dataset.source_lengths[row]), int(dataset.target_lengths[row]))
        if group and width * (len(group) + 1) > max_tokens:
            yield collator([dataset[member] for member in group], np.array(group))
            group, width = [], max(int(dataset.source_lengths[row]), int(dataset.target_lengths[row]))
        group.append(row)
        widest = width
    yield collator([dataset[member] for member in group], np.array(group))


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """0 .. count - 1 in random order, of which few exist at one time."""
    order = Permutation(count, seed)
    for start in range(0, count, ROWS_AT_A_TIME):
        yield from order.elements(start, min(start + ROWS_AT_A_TIME, count)).tolist()


def _both_gradients(
    student: TeacherForced,
    parameters: Sequence[Tensor],
    teacher: TeacherForced,
    batch: Batch,
    signal: KeptSignal,
    *,
    temperature: float,
) -> list[tuple[Tensor, ...]]:
    """The student's gradients from the store and from the whole distribution. No model is sharded."""
    with torch.no_grad():
        teacher_features, teacher_weight = teacher.projection.operands(target_hidden(teacher, batch.for_kind(teacher.kind)))
    features, weight = student.projection.operands(target_hidden(student, batch))
    terms = DistillationTerms(Divergence("forward_kl"), temperature, hard_weight=0.0, kd_weight=1.0, label_smoothing=0.0)
    learn = partial(linear_distillation, labels=batch.targets.labels, terms=terms, chunk_tokens="auto", selected=None)
    losses = [learn(features, weight, signal=each).loss for each in (signal, DenseSignal([teacher_features], [teacher_weight]))]
    return [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True) for loss in losses
    ]


def _angle(tokens: int, kept: Sequence[Tensor], whole: Sequence[Tensor]) -> Angle:
    def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        return math.fsum(float(one.double().flatten().dot(two.double().flatten())) for one, two in zip(left, right, strict=True))

    lengths = math.sqrt(dot(kept, kept)), math.sqrt(dot(whole, whole))
    if 0.0 in lengths:
        return Angle(tokens, math.nan, math.nan)
    cosine = dot(kept, whole) / lengths[0] / lengths[1]
    return Angle(tokens, math.degrees(math.acos(max(-1.0, min(1.0, cosine)))), lengths[0] / lengths[1])
