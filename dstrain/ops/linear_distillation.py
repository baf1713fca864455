"""Vocabulary projections of student and teacher, cross-entropy and divergence in one, without logits for all tokens at once.

As in `linear_cross_entropy`, the rows are walked in chunks; while a chunk's logits of both models exist, the losses are taken
and at once their gradients with respect to the student's features and weight. Memory: some seven times chunk_tokens x V in fp32,
whatever the number of tokens or teachers, plus the two gradients. Nothing of a teacher is kept or learns.

With student logits z, teacher logits u, temperature T, label y, all sums over scored tokens:

    hard = label-smoothed cross-entropy of softmax(z), as in `linear_cross_entropy`
    kd   = T^2 D(softmax(u / T), softmax(z / T)) over selected tokens; D: see `divergence`
    loss = hard_weight hard + kd_weight kd

T^2 keeps the size of kd's gradient where T changes (Hinton et al. 2015). Several teachers are one whose probabilities at
temperature T are the mean of theirs.

Precision: products run in each model's own dtype; softmax, losses and the sum of the weight's gradient are fp32 (fp64 for fp64
inputs). Under `torch.autocast` the student's inputs are cast to its dtype; the teacher's are as they come. In fp16 a slope is
rounded before backward multiplies it by the scale of the loss, so what is under 6e-8 of it is lost, as most types' part is where
V is 100,000 and more: prefer bf16. A scale inside would have to fit into fp16 through a sum over all types or rows as well.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.batch import IGNORE_INDEX, sent
from dstrain.ops.divergence import (
    Divergence,
    kind_of,
    reference_sparse_value,
    reference_value,
    sparse_fit,
    value_and_slope,
)
from dstrain.ops.forward_gradients import sums_with_gradients
from dstrain.ops.mixed_precision import accumulator, add_product, autocast, product
from dstrain.ops.row_argmax import row_argmax
from dstrain.ops.teacher_signal import DenseSignal, LogProbsSignal, Signal, SparseSignal


class DistillationTerms(NamedTuple):
    """What the loss is made of. temperature: of both models, already inside the probabilities of a sparse signal."""

    divergence: Divergence
    temperature: float
    hard_weight: float
    kd_weight: float
    label_smoothing: float


class DistillationSums(NamedTuple):
    """() sums over scored rows, in nats. loss: with gradient to features and weight; the others have none.

    kd: over selected rows. agreement: how often the best type of student and teacher is the same, the first of equally good ones.
    selected: how many rows, or the sum of their weights, learn from the teacher.
    """

    loss: Tensor
    hard: Tensor
    kd: Tensor
    nll: Tensor
    agreement: Tensor
    selected: Tensor


def linear_distillation(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    signal: Signal,
    *,
    terms: DistillationTerms,
    chunk_tokens: int,
    selected: Tensor | None,
) -> DistillationSums:
    """All sums of the head of this file.

    features: (n, E), weight: (V, E), of one dtype; labels: (n,) int64 in [0, V) or `IGNORE_INDEX`, whose rows add exactly zero;
    signal: of these n rows. selected: (n,) weights of the rows' kd, or whether they have any; None = all are 1. chunk_tokens:
    rows whose logits exist at one time; it moves no result beyond rounding. ValueError where the signal cannot give the
    divergence.
    """
    check_signal(signal, terms.divergence)
    features, weight = autocast(features), autocast(weight)
    with_grad = torch.is_grad_enabled()
    plan = _Plan(
        terms=terms,
        chunk_tokens=chunk_tokens,
        features_learn=with_grad and features.requires_grad,
        weight_learns=with_grad and weight.requires_grad,
    )
    rows = _rows(labels, signal, selected, accumulator(features.dtype))
    return DistillationSums(*sums_with_gradients(features, weight, partial(_walk, rows=rows, plan=plan)))


def reference_linear_distillation(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    signal: Signal,
    *,
    terms: DistillationTerms,
    chunk_tokens: int,
    selected: Tensor | None,
) -> DistillationSums:
    """The same by all logits and autograd; `chunk_tokens` is not used."""
    check_signal(signal, terms.divergence)
    scored = labels != IGNORE_INDEX
    signal, label = signal.part(scored), labels[scored].unsqueeze(1)
    logits = F.linear(autocast(features[scored]), autocast(weight)).to(accumulator(features.dtype))  # (n, V)
    log_probs, cool = F.log_softmax(logits, dim=1), F.log_softmax(logits / terms.temperature, dim=1)
    if isinstance(signal, SparseSignal):
        values, best = reference_sparse_value(terms.divergence, cool, signal), _best(signal)
    else:
        teacher = _reference_log_probs(signal, terms.temperature, logits.dtype)
        values, best = reference_value(terms.divergence, cool, teacher), teacher.argmax(1, keepdim=True)
    weights = torch.ones_like(values) if selected is None else selected[scored].to(values.dtype)
    spread = terms.label_smoothing / (logits.shape[1] - 1)
    nll = -log_probs.gather(1, label).sum()
    hard = (1 - terms.label_smoothing - spread) * nll - spread * log_probs.sum()
    kd = terms.temperature**2 * (weights * values).sum()
    loss = terms.hard_weight * hard + terms.kd_weight * kd
    agreement = (best == logits.argmax(1, keepdim=True)).sum().to(loss.dtype)
    return DistillationSums(loss, hard.detach(), kd.detach(), nll.detach(), agreement, weights.sum())


def _reference_log_probs(signal: DenseSignal | LogProbsSignal, temperature: float, dtype: torch.dtype) -> Tensor:
    """(n, V): of the mean of the teachers' probabilities."""
    if isinstance(signal, LogProbsSignal):
        kept = torch.from_numpy(np.concatenate(signal.log_probs)).to(dtype)
        return F.log_softmax(kept * signal.temperature / temperature, dim=1)
    pairs = zip(signal.features, signal.weights, strict=True)
    return torch.stack([F.softmax(F.linear(*pair).to(dtype) / temperature, dim=1) for pair in pairs]).mean(0).log()


def check_signal(signal: Signal, divergence: Divergence) -> None:
    """ValueError where a kept signal is asked for more than it holds."""
    if isinstance(signal, SparseSignal) and not signal.with_tail and kind_of(divergence) != "forward_kl":
        raise ValueError(f"{divergence.kind} needs the mass of all types, but this signal says nothing of those it does not hold")


class _Plan(NamedTuple):
    terms: DistillationTerms
    chunk_tokens: int
    features_learn: bool
    weight_learns: bool


class _Rows(NamedTuple):
    """labels, scored (is no padding), taught (weight of kd): (n, 1)"""

    labels: Tensor
    scored: Tensor
    taught: Tensor
    signal: Signal

    def part(self, rows: slice) -> _Rows:
        """Some of the rows."""
        return _Rows(self.labels[rows], self.scored[rows], self.taught[rows], self.signal.part(rows))


def _rows(labels: Tensor, signal: Signal, selected: Tensor | None, wide: torch.dtype) -> _Rows:
    """What a caller gives of the rows, with padding made harmless."""
    scored = (labels != IGNORE_INDEX).unsqueeze(1)
    return _Rows(
        labels=labels.unsqueeze(1).masked_fill(~scored, 0),
        scored=scored,
        taught=scored.to(wide) if selected is None else selected.unsqueeze(1).to(wide) * scored,
        signal=_cleared(signal, scored),
    )


def _walk(
    features: Tensor, weight: Tensor, rows: _Rows, plan: _Plan
) -> tuple[DistillationSums, tuple[Tensor | None, Tensor | None]]:
    """The sums and, as far as asked for, the gradients of the loss with respect to features and weight."""
    num_rows, wide = features.shape[0], accumulator(features.dtype)
    features = features.masked_fill(~rows.scored, 0)
    logits = features.new_empty(min(plan.chunk_tokens, num_rows), weight.shape[0], dtype=wide)
    figures = features.new_empty(len(_Figures._fields), num_rows, 1, dtype=wide)
    features_gradient = torch.empty_like(features, dtype=wide) if plan.features_learn else None
    weight_gradient = torch.zeros_like(weight, dtype=wide) if plan.weight_learns else None
    for start in range(0, num_rows, plan.chunk_tokens):
        place = slice(start, start + plan.chunk_tokens)
        chunk = features[place]
        product(chunk, weight.t(), out=logits[: len(chunk)])
        found, slope = _chunk(logits[: len(chunk)], rows.part(place), plan.terms)
        torch.stack(found, out=figures[:, place])
        if plan.features_learn or plan.weight_learns:
            slope = slope.to(features.dtype)
            if features_gradient is not None:
                product(slope, weight, out=features_gradient[place])
            if weight_gradient is not None:
                add_product(weight_gradient, slope.t(), chunk)
    totals = _Figures(*figures.masked_fill_(~rows.scored, 0).sum((1, 2)))
    terms = plan.terms
    kd = terms.temperature**2 * totals.value
    loss = terms.hard_weight * totals.hard + terms.kd_weight * kd
    sums = DistillationSums(loss, totals.hard, kd, totals.nll, totals.agreement, rows.taught.sum())
    return sums, (features_gradient, weight_gradient)


class _Figures(NamedTuple):
    """(c, 1) of a chunk, or () of all rows. value: of the divergence, weighted."""

    hard: Tensor
    value: Tensor
    nll: Tensor
    agreement: Tensor


def _chunk(logits: Tensor, rows: _Rows, terms: DistillationTerms) -> tuple[_Figures, Tensor]:
    """The figures of one chunk, and the slope of its loss with respect to the logits, (c, V); the logits are used up."""
    if isinstance(rows.signal, SparseSignal) and terms.temperature == 1:
        return _sparse_chunk(logits, rows, rows.signal, terms)
    spread = terms.label_smoothing / (logits.shape[1] - 1)
    confidence = 1 - terms.label_smoothing - spread
    log_probs = cool = torch.log_softmax(logits, 1)
    if terms.temperature != 1:
        cool = torch.log_softmax(logits.div_(terms.temperature), 1, out=logits)
    nll = -log_probs.gather(1, rows.labels)
    hard = confidence * nll
    if spread:
        hard.sub_(log_probs.sum(1, keepdim=True), alpha=spread)
    value, slope, best = _learn(cool, rows, terms)
    agreement = best == row_argmax(log_probs)
    slope.mul_(rows.taught * (terms.kd_weight * terms.temperature))
    if terms.hard_weight:
        hard_slope = log_probs.exp_().sub_(spread)
        hard_slope.scatter_add_(1, rows.labels, hard_slope.new_full(nll.shape, -confidence))
        slope.addcmul_(hard_slope, rows.scored.to(slope.dtype), value=terms.hard_weight)
    return _Figures(hard, value.mul_(rows.taught), nll, agreement.to(nll.dtype)), slope


def _sparse_chunk(logits: Tensor, rows: _Rows, signal: SparseSignal, terms: DistillationTerms) -> tuple[_Figures, Tensor]:
    """The same where both slopes are multiples of one softmax and few numbers beside: as fast as cross-entropy alone."""
    vocab_size = logits.shape[1]
    spread = terms.label_smoothing / (vocab_size - 1)
    confidence = 1 - terms.label_smoothing - spread
    agreement = _best(signal) == row_argmax(logits)
    label_logit, total = logits.gather(1, rows.labels), logits.sum(1, keepdim=True) if spread else None
    fit = sparse_fit(terms.divergence, logits, signal)
    nll = fit.lse - label_logit
    taught, scored = rows.taught * terms.kd_weight, rows.scored.to(nll.dtype) * terms.hard_weight
    slope = fit.slope(taught, scored)
    hard = confidence * nll
    if total is not None:
        hard.add_(fit.lse * vocab_size - total, alpha=spread)
        slope.sub_(scored * spread)
    slope.scatter_add_(1, rows.labels, -confidence * scored)
    return _Figures(hard, fit.value.mul_(rows.taught), nll, agreement.to(nll.dtype)), slope


def _learn(student: Tensor, rows: _Rows, terms: DistillationTerms) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence (c, 1) from a chunk's teacher, its slope (c, V), and the teacher's best type (c, 1)."""
    signal = rows.signal
    if isinstance(signal, SparseSignal):
        fit = sparse_fit(terms.divergence, student, signal)
        return fit.value, fit.slope(), _best(signal)
    teacher = _teacher_log_probs(signal, terms.temperature, like=student).masked_fill_(~rows.scored, 0)
    best = row_argmax(teacher)
    return *value_and_slope(terms.divergence, student, teacher), best


def _best(signal: SparseSignal) -> Tensor:
    """The most probable type of each row. -> (c, 1)"""
    return signal.ids.gather(1, signal.probs.argmax(1, keepdim=True)).clamp_min(0)


def _teacher_log_probs(signal: DenseSignal | LogProbsSignal, temperature: float, *, like: Tensor) -> Tensor:
    """At that temperature, of the mean of the teachers' probabilities. (n, V), of the dtype and on the device of `like`."""
    if isinstance(signal, LogProbsSignal):
        kept = sent(torch.from_numpy(np.concatenate(signal.log_probs)), like.device).to(like.dtype)
        return torch.log_softmax(kept.mul_(signal.temperature / temperature), 1, out=kept)
    total: Tensor | None = None
    for features, weight in zip(signal.features, signal.weights, strict=True):
        logits = like.new_empty(len(features), len(weight))
        torch.log_softmax(product(features, weight.t(), out=logits).div_(temperature), 1, out=logits)
        total = logits if total is None else torch.logaddexp(total, logits, out=total)
    assert total is not None, "a dense signal has at least one teacher"
    return total.sub_(math.log(len(signal.features))) if len(signal.features) > 1 else total


def _cleared(signal: Signal, scored: Tensor) -> Signal:
    """The signal without what it says of rows that are not scored, which may be anything."""
    if isinstance(signal, SparseSignal):
        return replace(signal, probs=signal.probs.masked_fill(~scored, 0), tail=signal.tail.masked_fill(~scored.squeeze(1), 0))
    return signal  # of all types: cleared chunk by chunk
