"""A divergence from dense teacher logits and its gradient: the kinds and formulas of `ops/divergence.py`.

With whole rows one launch reads the logits of student and teacher for the sums and once more for the gradient; forward_kl, whose
gradient needs no sum, reads them once. For a slice of the vocabulary the sums are one launch, and after the ranks have added them
the gradient is another. Sums are kept a column of a block and added at the end: one order, no atomics.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dstrain.ops.divergence import Divergence, DivergenceKind, kind_of
from dstrain.ops.triton.launch import block_for, warps_for
from dstrain.ops.triton.softmax import SoftmaxStatistics
from dstrain.ops.vocabulary import Reductions

CODES: dict[DivergenceKind, int] = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "jensen_shannon": 2,
    "total_variation": 3,
    "skew_kl": 4,
}
_FORWARD: tl.constexpr = tl.constexpr(0)
_REVERSE: tl.constexpr = tl.constexpr(1)
_JENSEN_SHANNON: tl.constexpr = tl.constexpr(2)
_TOTAL_VARIATION: tl.constexpr = tl.constexpr(3)


class Tempered(NamedTuple):
    """Logits (c, V), the divisor that makes their distribution, and their statistics at it."""

    logits: Tensor
    temperature: float
    statistics: SoftmaxStatistics


def divergence_gradient_(
    divergence: Divergence,
    student: Tempered,
    teacher: Tempered,
    reductions: Reductions,
    *,
    weight: Tensor,
    plain_weight: float,
) -> Tensor:
    """value (c, 1); writes weight (gradient of the value) + plain_weight softmax(z) over the student's logits z.

    weight: (c, 1), may be expanded. The gradient is with respect to z / T. In one collective, with all that is waiting.
    """
    rows, entries = student.logits.shape
    sums = student.logits.new_empty(rows, 2)
    kind, mix = CODES[kind_of(divergence)], divergence.parameter
    log_mix = (math.log(mix), math.log1p(-mix)) if kind_of(divergence) in {"jensen_shannon", "skew_kl"} else (0.0, 0.0)
    of_student, of_teacher = student.statistics, teacher.statistics
    row_numbers = torch.cat(
        [of_student.max, of_student.log_sum, of_student.plain_log_sum, of_teacher.max, of_teacher.log_sum, weight], 1
    )

    def launch(sums: Tensor, *, with_sums: bool, with_gradient: bool) -> None:
        if not rows:
            return
        _divergence_kernel[(rows,)](
            student.logits,
            teacher.logits,
            row_numbers,
            sums,
            plain_weight,
            entries,
            student.logits.stride(0),
            teacher.logits.stride(0),
            1 / student.temperature,
            1 / teacher.temperature,
            mix,
            *log_mix,
            KIND=kind,
            SUMS=with_sums,
            GRADIENT=with_gradient,
            ONE_PASS=with_sums and with_gradient and kind == CODES["forward_kl"],
            PLAIN=plain_weight != 0,
            BLOCK=block_for(entries),
            num_warps=warps_for(block_for(entries)),
        )

    is_whole = reductions.vocabulary.group is None
    launch(sums, with_sums=True, with_gradient=is_whole)
    if not is_whole:
        sums = reductions.add(sums).result().contiguous()
        launch(sums, with_sums=False, with_gradient=True)
    return sums[:, :1]


@triton.jit
def _log_sum_of_two(first, second):
    """log(exp(first) + exp(second)), also if both exponentials are 0 in float32."""
    higher = tl.maximum(first, second)
    return higher + tl.log(1 + tl.exp(tl.minimum(first, second) - higher))


@triton.jit
def _terms(student, teacher, mix, log_mix, log_rest, KIND: tl.constexpr):
    """Of each entry: its share of the value, of the sum that the gradient needs, and g with gradient = g - p sum."""
    p, q = tl.exp(student), tl.exp(teacher)
    if KIND == _FORWARD:
        value, needed, g = q * (teacher - student), p * 0.0, p - q
    elif KIND == _REVERSE:
        value = p * (student - teacher)
        needed, g = value, value
    elif KIND == _TOTAL_VARIATION:
        difference = p - q
        sign = tl.where(difference > 0, 0.5, tl.where(difference < 0, -0.5, 0.0))
        value, g = difference * sign, p * sign
        needed = g
    elif KIND == _JENSEN_SHANNON:
        mixture = _log_sum_of_two(teacher + log_mix, student + log_rest)
        g = (1 - mix) * p * (student - mixture)
        value, needed = mix * q * (teacher - mixture) + g, g
    else:  # skew_kl
        mixture = _log_sum_of_two(teacher + log_mix, student + log_rest)
        g = -(1 - mix) * tl.exp(student + teacher - mixture)
        value, needed = q * (teacher - mixture), g
    return value, needed, g


@triton.jit
def _below_and_log_probs(pointer, columns, inside, maximum, scale, log_sum):
    """Of a block: the logits below the maximum, and the log-probabilities."""
    below = tl.load(pointer + columns, mask=inside, other=0.0) - maximum
    return below, below * scale - log_sum


@triton.jit
def _write_gradient(pointer, columns, inside, gradient, plain_weight, below_lse, PLAIN: tl.constexpr):
    if PLAIN:
        gradient += plain_weight * tl.exp(below_lse)
    tl.store(pointer + columns, gradient, mask=inside)


@triton.jit
def _divergence_kernel(
    student_logits,
    teacher_logits,
    row_numbers,
    sums,
    plain_weight,
    entries,
    student_stride,
    teacher_stride,
    student_scale,
    teacher_scale,
    mix,
    log_mix,
    log_rest,
    KIND: tl.constexpr,
    SUMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    ONE_PASS: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums: (c, 2), the value and the sum that the gradient needs; written if SUMS, else read."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    z, u, own = student_logits + row * student_stride, teacher_logits + row * teacher_stride, row_numbers + row * 6
    z_max, z_log_sum, plain_log_sum = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    u_max, u_log_sum, weight = tl.load(own + 3), tl.load(own + 4), tl.load(own + 5)
    needed = tl.full((), 0.0, tl.float32)
    if SUMS:
        values, needs = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, entries, BLOCK):
            columns = start + at
            inside = columns < entries
            below, student = _below_and_log_probs(z, columns, inside, z_max, student_scale, z_log_sum)
            _, teacher = _below_and_log_probs(u, columns, inside, u_max, teacher_scale, u_log_sum)
            value, need, g = _terms(student, teacher, mix, log_mix, log_rest, KIND)
            values += tl.where(inside, value, 0.0)
            needs += tl.where(inside, need, 0.0)
            if ONE_PASS:
                _write_gradient(z, columns, inside, weight * g, plain_weight, below - plain_log_sum, PLAIN)
        needed = tl.sum(needs, 0)
        tl.store(sums + 2 * row, tl.sum(values, 0))
        tl.store(sums + 2 * row + 1, needed)
    else:
        needed = tl.load(sums + 2 * row + 1)
    if GRADIENT and not ONE_PASS:
        for start in range(0, entries, BLOCK):
            columns = start + at
            inside = columns < entries
            below, student = _below_and_log_probs(z, columns, inside, z_max, student_scale, z_log_sum)
            _, teacher = _below_and_log_probs(u, columns, inside, u_max, teacher_scale, u_log_sum)
            _, _, g = _terms(student, teacher, mix, log_mix, log_rest, KIND)
            gradient = weight * (g - tl.exp(student) * needed)
            _write_gradient(z, columns, inside, gradient, plain_weight, below - plain_log_sum, PLAIN)
