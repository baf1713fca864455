"""How far a store's gradient points away from that of the whole distribution: the test of a store on one's own teacher.

For the same tokens the student's gradient is taken twice, over all its parameters: from what the store kept, and from all of the
teacher's probabilities. An unbiased store has an angle that falls like one over the root of the number of tokens; the angle of a
biased one stays, however many there are. The loss is the cross-entropy to the teacher (the forward divergence but for a constant)
with both logits divided by the store's temperature.
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
from dstrain.data.collate import collate
from dstrain.data.dataset import Dataset
from dstrain.data.permutation import Permutation
from dstrain.ops.linear_cross_entropy import scored_rows
from dstrain.ops.linear_distillation import teacher_log_probs
from dstrain.protocols import KeptSignal, SparseSignal, TeacherForced

CHUNK = 256
"""Tokens whose logits exist at one time."""
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
    wanted, done = sorted(tokens), 0
    for batch in batches:
        gradients = _both_gradients(student, parameters, teacher, batch, signal_of(batch), temperature=temperature)
        for total, found in zip(sums, gradients, strict=True):
            torch._foreach_add_(total, found)
        done += batch.num_targets
        while wanted and done >= wanted[0]:
            yield _angle(done, *sums)
            wanted.pop(0)
        if not wanted:
            return
    if done:
        yield _angle(done, *sums)


def random_batches(dataset: Dataset, max_tokens: int, *, pad_id: int, eos_id: int, seed: int = 1) -> Iterator[Batch]:
    """The rows of a split in random order, in batches of at most `max_tokens` padded tokens, once through."""
    group: list[int] = []
    widest = 0
    for row in _shuffled(len(dataset), seed):
        width = max(widest, int(dataset.source_lengths[row]), int(dataset.target_lengths[row]))
        if group and width * (len(group) + 1) > max_tokens:
            yield collate([dataset[member] for member in group], np.array(group), pad_id=pad_id, eos_id=eos_id)
            group, width = [], max(int(dataset.source_lengths[row]), int(dataset.target_lengths[row]))
        group.append(row)
        widest = width
    yield collate([dataset[member] for member in group], np.array(group), pad_id=pad_id, eos_id=eos_id)


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """0 .. count - 1 in random order, of which few exist at one time."""
    order = Permutation(count, seed)
    for start in range(0, count, ROWS_AT_A_TIME):
        yield from order.elements(start, min(start + ROWS_AT_A_TIME, count)).tolist()


def reached_target(student_probs: Tensor, signal: SparseSignal) -> Tensor:
    """The distribution towards which a sparse signal pulls: where the student's logits have the slope probs - target. (n, V)

    Types that were kept are pulled to their masses; the tail is one bucket, so its mass goes to the others as the student has it.
    """
    used = signal.ids >= 0
    ids = signal.ids.clamp_min(0)
    rest = student_probs.scatter(1, ids, student_probs.gather(1, ids).masked_fill(used, 0.0))
    rest *= (signal.tail / rest.sum(1).clamp_min(torch.finfo(rest.dtype).tiny))[:, None]
    return rest.scatter_add_(1, ids, signal.probs)


def _target(student_probs: Tensor, signal: KeptSignal, temperature: float) -> Tensor:
    """Towards which a signal of any kind pulls. (n, V)"""
    if isinstance(signal, SparseSignal):
        return reached_target(student_probs, signal)
    return teacher_log_probs(signal, temperature, like=student_probs).exp_()


def _both_gradients(
    student: TeacherForced,
    parameters: Sequence[Tensor],
    teacher: TeacherForced,
    batch: Batch,
    signal: KeptSignal,
    *,
    temperature: float,
) -> list[tuple[Tensor, ...]]:
    """The student's gradients from the store and from the whole distribution."""
    rows = scored_rows(batch.labels.flatten(), batch.num_targets)
    with torch.no_grad():
        taught = teacher(batch.source, batch.target).hidden.flatten(0, 1).index_select(0, rows)
    hidden = student(batch.source, batch.target).hidden.flatten(0, 1).index_select(0, rows)

    def compare(features: Tensor, weight: Tensor) -> list[tuple[Tensor, ...]]:
        slopes = teacher.reduce_projection(
            taught, partial(_slopes, student=(features.detach(), weight.detach()), signal=signal, temperature=temperature)
        )
        ends = (features, weight)
        return [
            torch.autograd.grad(ends, parameters, slope, retain_graph=True, allow_unused=True, materialize_grads=True)
            for slope in slopes
        ]

    return student.reduce_projection(hidden, compare)


@torch.no_grad()
def _slopes(
    features: Tensor, weight: Tensor, *, student: tuple[Tensor, Tensor], signal: KeptSignal, temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """Slopes of both losses with respect to the student's features (n, E) and weight (V, E). features, weight: the teacher's."""
    own, projection = student
    found = [(torch.empty_like(own), torch.zeros_like(projection)) for _ in range(2)]
    for start in range(0, len(own), CHUNK):
        part = slice(start, start + CHUNK)
        whole = torch.softmax(features[part] @ weight.t() / temperature, 1)
        probs = torch.softmax(own[part] @ projection.t() / temperature, 1)
        kept = _target(probs, signal.part(part), temperature)
        for (own_slope, projection_slope), target in zip(found, (kept, whole), strict=True):
            slope = (probs - target) / temperature  # (c, V)
            own_slope[part] = slope @ projection
            projection_slope.addmm_(slope.t(), own[part])
    return found


def _angle(tokens: int, kept: Sequence[Tensor], whole: Sequence[Tensor]) -> Angle:
    def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        return math.fsum(float(one.double().flatten().dot(two.double().flatten())) for one, two in zip(left, right, strict=True))

    lengths = math.sqrt(dot(kept, kept)), math.sqrt(dot(whole, whole))
    if 0.0 in lengths:
        return Angle(tokens, math.nan, math.nan)
    cosine = dot(kept, whole) / lengths[0] / lengths[1]
    return Angle(tokens, math.degrees(math.acos(max(-1.0, min(1.0, cosine)))), lengths[0] / lengths[1])
