"""Vocabulary projections of student and teacher, cross-entropy and divergence in one, without the logits of all tokens at once.

With student logits z, teacher logits u, temperature T, label y, all sums over tokens:

    hard = label-smoothed cross-entropy of softmax(z), see `smoothing.py`
    kd   = T^2 D(softmax(u / T), softmax(z / T)) over selected tokens; D: see `divergence.py`
    loss = hard_weight hard + kd_weight kd

T^2 keeps the size of kd's gradient if T changes (Hinton et al. 2015). Several teachers are one whose probabilities at temperature
T are the mean of theirs.

Memory: some six times chunk_tokens x V in fp32, whatever the number of tokens, one more for each teacher after the second, and
the gradients of the student's features and weight; twice chunk_tokens x V if the teacher's distribution is sparse, three times
if besides the temperature is not 1. Teachers get no gradient, and nothing of them is kept. Their products run in their own
dtype, never in autocast's.

Collectives of a vocabulary in slices: two a chunk, the normalizers of student and teachers and then all sums; one if the
teacher's distribution is sparse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.config_base import ChunkTokens
from dstrain.ops.chunked_projection import TokenLosses, chunked_loss
from dstrain.ops.divergence import (
    Divergence,
    kind_of,
    reference_sparse_value,
    reference_value,
    sparse_fit,
    value_and_grad,
)
from dstrain.ops.kernels import DENSE_DISTILLATION, SPARSE_DISTILLATION
from dstrain.ops.mixed_precision import accum_dtype, matmul_into, to_autocast_dtype
from dstrain.ops.teacher_signal import DenseSignal, LogProbsSignal, Signal, SparseSignal
from dstrain.ops.token_loss.smoothing import LabelSmoothing
from dstrain.ops.vocabulary import Reductions, VocabularySlice
from dstrain.wire import sent


class DistillationTerms(NamedTuple):
    """The terms of the loss. temperature: of both models, already inside the probabilities of a sparse signal."""

    divergence: Divergence
    temperature: float
    hard_weight: float
    kd_weight: float
    label_smoothing: float


class DistillationSums(NamedTuple):
    """() sums over tokens, in nats; nll: (n,), of each token. loss: with gradient to features and weight; the others have none.

    kd: over selected tokens. agreement: how often student and teacher have the same most probable entry, the first of equally
    probable ones. selected: how many tokens, or the sum of their weights, learn from the teacher.
    """

    loss: Tensor
    hard: Tensor
    kd: Tensor
    nll: Tensor
    agreement: Tensor
    selected: Tensor


@dataclass(frozen=True)
class DistillationTargets:
    """labels: (n, 1); signal: of the same n tokens; selected: (n, 1) weights of their kd, or None = all are 1."""

    labels: Tensor
    signal: Signal
    selected: Tensor | None

    def __getitem__(self, tokens: slice) -> DistillationTargets:
        """Of some of the tokens."""
        selected = None if self.selected is None else self.selected[tokens]
        return DistillationTargets(self.labels[tokens], self.signal[tokens], selected)


@dataclass(frozen=True)
class TokenDistillation:
    """Implements `TokenLoss` on `DistillationTargets`. Metrics: hard, kd, nll, agreement."""

    terms: DistillationTerms
    num_metrics = 4

    def __call__(
        self,
        logits: Tensor,
        logit_sums: Tensor,
        targets: DistillationTargets,
        vocabulary: VocabularySlice,
        weights: Tensor | None,
    ) -> TokenLosses:
        """(c, V), (c, 1), of c tokens"""
        smoothing = LabelSmoothing.of(self.terms.label_smoothing, vocabulary.vocab_size)
        reductions = vocabulary.reductions()
        total = reductions.add(logit_sums)
        op = SPARSE_DISTILLATION if isinstance(targets.signal, SparseSignal) else DENSE_DISTILLATION
        student: StudentLosses = op.choose(logits.device, logits.dtype)(logits, targets, self.terms, reductions)
        vocabulary.add_at_(student.logits_grad, targets.labels, -self.terms.hard_weight * smoothing.confidence)
        hard = smoothing.loss(student.nll, student.lse, total.result())
        kd = student.value.mul_(self.terms.temperature**2)
        if targets.selected is not None:
            kd.mul_(targets.selected)
        loss = self.terms.hard_weight * hard + self.terms.kd_weight * kd
        metrics = (hard, kd, student.nll, student.agreement.to(kd.dtype))
        return TokenLosses(loss, metrics, student.logits_grad, self.terms.hard_weight * smoothing.per_token)


class StudentLosses(NamedTuple):
    """nll, lse: (c, 1), at temperature 1. value: (c, 1) of the divergence. logits_grad: (c, V), without the label's entry."""

    nll: Tensor
    lse: Tensor
    value: Tensor
    agreement: Tensor
    logits_grad: Tensor


def kd_factor(targets: DistillationTargets, terms: DistillationTerms) -> Tensor | float:
    """Of the divergence's gradient: T^2 of the loss, and 1 / T of the logits' temperature. (c, 1), or the same for all."""
    factor = terms.kd_weight * terms.temperature
    return factor if targets.selected is None else targets.selected * factor


def composed_dense(
    logits: Tensor, targets: DistillationTargets, terms: DistillationTerms, reductions: Reductions
) -> StudentLosses:
    """By log-probabilities of all entries, twice if the temperature is not 1."""
    log_probs = tempered_log_probs = logits
    if terms.temperature != 1:
        log_probs = torch.empty_like(logits)
    lse = reductions.log_softmax(logits, out=log_probs)
    if terms.temperature != 1:
        reductions.log_softmax(logits.div_(terms.temperature), out=tempered_log_probs)
    teacher = teacher_log_probs(targets.signal, terms.temperature, reductions, like=logits)
    # All normalizers are known.
    label_log_probs = reductions.gather(log_probs, targets.labels)
    student_best, teacher_best = reductions.argmax(log_probs), reductions.argmax(teacher)
    value, logits_grad = value_and_grad(terms.divergence, tempered_log_probs, teacher, reductions)
    logits_grad.mul_(kd_factor(targets, terms))
    if terms.hard_weight:
        logits_grad.add_(log_probs.exp_(), alpha=terms.hard_weight)
    agreement = teacher_best.result() == student_best.result()
    return StudentLosses(-label_log_probs.result(), lse.result(), value, agreement, logits_grad)


def composed_sparse(
    logits: Tensor, targets: DistillationTargets, terms: DistillationTerms, reductions: Reductions
) -> StudentLosses:
    """By one softmax, of which both gradients are multiples except for few entries: as fast as cross-entropy.

    By two if the temperature is not 1.
    """
    signal = targets.signal
    assert isinstance(signal, SparseSignal)
    best, label_logits = reductions.argmax(logits), reductions.gather(logits, targets.labels)
    if terms.temperature == 1:
        fit = sparse_fit(terms.divergence, logits, signal, reductions)
        lse, nll = fit.lse, fit.lse - label_logits.result()
        logits_grad = fit.logits_grad_(kd_factor(targets, terms), terms.hard_weight)
    else:
        probs = logits.clone()
        pending = reductions.softmax_(probs)
        fit = sparse_fit(terms.divergence, logits.div_(terms.temperature), signal, reductions)
        normalizer = pending.result()
        lse, nll = normalizer.logsumexp, normalizer.nll(label_logits.result())
        logits_grad = fit.logits_grad_(kd_factor(targets, terms)).add_(probs, alpha=terms.hard_weight)
    return StudentLosses(nll, lse, fit.value, most_probable(signal) == best.result(), logits_grad)


def linear_distillation(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    signal: Signal,
    *,
    terms: DistillationTerms,
    chunk_tokens: ChunkTokens,
    selected: Tensor | None,
    vocabulary: VocabularySlice | None = None,
) -> DistillationSums:
    """All sums of the head of this file.

    features: (n, E), weight: (V, E), labels: (n,) int64 in [0, V); signal: of these n tokens, over the whole vocabulary.
    selected: (n,) weights of the tokens' kd, or whether they have any; None = all are 1. The rest as in `chunked_loss`.
    ValueError if the signal cannot give the divergence.
    """
    check_signal(signal, terms.divergence)
    weights = None if selected is None else selected.unsqueeze(1).to(accum_dtype(features.dtype))
    loss_sum, (hard, kd, nll, agreement) = chunked_loss(
        features,
        weight,
        TokenDistillation(terms),
        DistillationTargets(labels.unsqueeze(1), signal, weights),
        chunk_tokens=chunk_tokens,
        vocabulary=vocabulary,
    )
    num_selected = torch.full_like(loss_sum, len(labels)) if weights is None else weights.sum()
    return DistillationSums(loss_sum, hard.sum(), kd.sum(), nll, agreement.sum(), num_selected)


def check_signal(signal: Signal, divergence: Divergence) -> None:
    """ValueError if a request exceeds the contents of a kept signal."""
    if isinstance(signal, SparseSignal) and not signal.with_tail and kind_of(divergence) != "forward_kl":
        raise ValueError(
            f"{divergence.kind} needs the mass of all vocabulary entries, but this signal lacks that of the entries left out"
        )


def most_probable(signal: SparseSignal) -> Tensor:
    """The most probable entry of each token. -> (c, 1)"""
    return signal.ids.gather(1, signal.probs.argmax(1, keepdim=True)).clamp_min(0)


def teacher_log_probs(signal: Signal, temperature: float, reductions: Reductions, *, like: Tensor) -> Tensor:
    """At that temperature, of the mean of the teachers' probabilities. (c, V), of the dtype and on the device of `like`.

    In one collective, with all that is waiting.
    """
    teachers = []
    for logits, own_temperature in teacher_logits(signal, temperature, reductions.vocabulary, like=like):
        teachers.append(logits if own_temperature == 1 else logits.div_(own_temperature))
    for normalizer in [reductions.log_softmax(logits, out=logits) for logits in teachers]:
        normalizer.result()
    mean, *others = teachers
    for log_probs in others:
        torch.logaddexp(mean, log_probs, out=mean)
    return mean.sub_(math.log(len(teachers))) if others else mean


def teacher_logits(
    signal: Signal, temperature: float, vocabulary: VocabularySlice, *, like: Tensor
) -> list[tuple[Tensor, float]]:
    """The logits of each teacher, (c, V), and the divisor that makes them those at that temperature."""
    if isinstance(signal, LogProbsSignal):
        stored = torch.from_numpy(np.concatenate(signal.log_probs)[:, vocabulary.start : vocabulary.stop])
        return [(sent(stored, like.device).to(like.dtype), temperature / signal.temperature)]
    assert isinstance(signal, DenseSignal)
    teachers = []
    for features, weight in zip(signal.features, signal.weights, strict=True):
        logits = matmul_into(features, vocabulary.rows(weight).t(), out=torch.empty_like(like))
        teachers.append((logits, temperature))
    return teachers


def reference_linear_distillation(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    signal: Signal,
    *,
    terms: DistillationTerms,
    chunk_tokens: ChunkTokens,
    selected: Tensor | None,
) -> DistillationSums:
    """The same from all logits by autograd; `chunk_tokens` is not used."""
    check_signal(signal, terms.divergence)
    logits = F.linear(to_autocast_dtype(features), to_autocast_dtype(weight)).to(accum_dtype(features.dtype))  # (n, V)
    log_probs, tempered_log_probs = F.log_softmax(logits, dim=1), F.log_softmax(logits / terms.temperature, dim=1)
    if isinstance(signal, SparseSignal):
        values, teacher_best = reference_sparse_value(terms.divergence, tempered_log_probs, signal), most_probable(signal)
    else:
        teacher = _reference_log_probs(signal, terms.temperature, logits.dtype)
        values, teacher_best = reference_value(terms.divergence, tempered_log_probs, teacher), teacher.argmax(1, keepdim=True)
    weights = torch.ones_like(values) if selected is None else selected.to(values.dtype)
    smoothing_per_token = terms.label_smoothing / (logits.shape[1] - 1)
    nll = -log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)
    hard = (1 - terms.label_smoothing - smoothing_per_token) * nll.sum() - smoothing_per_token * log_probs.sum()
    kd = terms.temperature**2 * (weights * values).sum()
    loss = terms.hard_weight * hard + terms.kd_weight * kd
    agreement = (teacher_best == logits.argmax(1, keepdim=True)).sum().to(loss.dtype)
    return DistillationSums(loss, hard.detach(), kd.detach(), nll.detach(), agreement, weights.sum())


def _reference_log_probs(signal: DenseSignal | LogProbsSignal, temperature: float, dtype: torch.dtype) -> Tensor:
    """(n, V): of the mean of the teachers' probabilities."""
    if isinstance(signal, LogProbsSignal):
        kept = torch.from_numpy(np.concatenate(signal.log_probs)).to(dtype)
        return F.log_softmax(kept * signal.temperature / temperature, dim=1)
    pairs = zip(signal.features, signal.weights, strict=True)
    return torch.stack([F.softmax(F.linear(*pair).to(dtype) / temperature, dim=1) for pair in pairs]).mean(0).log()
