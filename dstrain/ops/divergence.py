"""How far a student's distribution p is from a teacher's q, with its gradient; both over V vocabulary entries, as logarithms.

| kind | value | source |
|---|---|---|
| forward_kl | sum q log(q / p) | Hinton et al. 2015 |
| reverse_kl | sum p log(p / q) | Gu et al. 2024 (MiniLLM) |
| jensen_shannon | b sum q log(q / m) + (1 - b) sum p log(p / m), m = b q + (1 - b) p | Agarwal et al. 2024 (GKD) |
| total_variation | 1/2 sum abs(p - q) | Wen et al. 2023 (f-distill) |
| skew_kl | sum q log(q / m), m = a q + (1 - a) p | Ko et al. 2024 (DistiLLM) |

The convention of b = beta is GKD's: towards 0 the divergence behaves like forward_kl, towards 1 like reverse_kl. At both ends the
formula itself is 0; its limits after division by b or by 1 - b, which are forward_kl and reverse_kl themselves, replace it there.

The gradient is with respect to the logits that p is the softmax of. With g = d value / d p it is p (g - sum p g).

Top-k entries with a tail give every divergence, over k + 1 buckets of which the last holds all other entries; joining entries
never makes a divergence greater (data processing; Csiszar 1967). Sampled entries give only forward_kl: it is linear in q, so they
give its gradient without bias; the others would compare p with zeros that are not the teacher's.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dstrain.ops.teacher_signal import SparseSignal
from dstrain.ops.vocabulary import Reductions, VocabularySlice

DivergenceKind = Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "skew_kl"]


class Divergence(NamedTuple):
    """parameter: beta of jensen_shannon, alpha of skew_kl; the other kinds have none."""

    kind: DivergenceKind
    parameter: float = 0.0


LIMITS: dict[tuple[str, float], DivergenceKind] = {
    ("jensen_shannon", 0.0): "forward_kl",
    ("jensen_shannon", 1.0): "reverse_kl",
    ("skew_kl", 0.0): "forward_kl",
}


def kind_of(divergence: Divergence) -> DivergenceKind:
    """Its kind, which at an end of its parameter is another one."""
    return LIMITS.get(divergence, divergence.kind)


def value_and_grad(divergence: Divergence, student: Tensor, teacher: Tensor, reductions: Reductions) -> tuple[Tensor, Tensor]:
    """student, teacher: log-probabilities (c, V) -> value (c, 1), gradient with respect to the student's logits (c, V).

    In one collective, with all that is waiting: both the value and sum p g are sums of terms that need no other sum.
    """
    kind, mix = kind_of(divergence), divergence.parameter
    if kind == "forward_kl":
        probs = teacher.exp()
        value = reductions.sum((teacher - student).mul_(probs))
        return value.result(), student.exp().sub_(probs)
    probs = student.exp()
    if kind == "reverse_kl":
        log_ratio = student - teacher
        value = reductions.sum(log_ratio * probs)
        return value.result(), log_ratio.sub_(value.result()).mul_(probs)
    if kind == "total_variation":
        difference = probs - teacher.exp()
        distance = reductions.sum(difference.abs())
        sign = difference.sign_()
        mean = reductions.sum(probs * sign)
        return distance.result() * 0.5, sign.sub_(mean.result()).mul_(probs).mul_(0.5)
    mixture = student + math.log1p(-mix)
    torch.logaddexp(teacher + math.log(mix), mixture, out=mixture)
    value = reductions.sum((teacher - mixture).mul_(teacher.exp()))
    if kind == "skew_kl":
        share = mixture.neg_().add_(student).add_(teacher).exp_().mul_(1 - mix)  # (1 - a) p q / m
        shared = reductions.sum(share)
        return value.result(), probs.mul_(shared.result()).sub_(share)
    log_ratio = mixture.neg_().add_(student)
    reverse = reductions.sum(log_ratio * probs)
    grad = log_ratio.sub_(reverse.result()).mul_(probs).mul_(1 - mix)
    return mix * value.result() + (1 - mix) * reverse.result(), grad


def reference_value(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """The table above in words of torch, for autograd. student, teacher: log-probabilities (n, V) -> (n,)"""
    p, q, mix = student.exp(), teacher.exp(), divergence.parameter
    match kind_of(divergence):
        case "forward_kl":
            terms = q * (teacher - student)
        case "reverse_kl":
            terms = p * (student - teacher)
        case "jensen_shannon":
            mixture = (mix * q + (1 - mix) * p).log()
            terms = mix * q * (teacher - mixture) + (1 - mix) * p * (student - mixture)
        case "total_variation":
            terms = (p - q).abs() / 2
        case "skew_kl":
            terms = q * (teacher - (mix * q + (1 - mix) * p).log())
    return terms.sum(1)


ABSENT = -1e9
"""Below any real logit: its probability is exactly zero."""


class SparseFit(NamedTuple):
    """A divergence from a sparse signal, and the factors of its gradient and of the softmax p; (c, 1) unless said otherwise.

    lse: the logsumexp of the logits. others: the softmax among the entries that were not kept, (c, V), 0 at those that were; they
    have p = others_prob others and the gradient others_grad others. ids, probs, grads: the kept entries with their p and
    gradient, (c, k), 0 where unused.
    """

    value: Tensor
    lse: Tensor
    others: Tensor
    others_prob: Tensor
    others_grad: Tensor
    ids: Tensor
    probs: Tensor
    grads: Tensor
    vocabulary: VocabularySlice

    def logits_grad_(self, kd_weight: Tensor | float = 1.0, prob_weight: float = 0.0) -> Tensor:
        """`kd_weight` times the gradient plus `prob_weight` times p, (c, V), written over `others`."""
        grad = self.others.mul_(kd_weight * self.others_grad + prob_weight * self.others_prob)
        return self.vocabulary.add_at_(grad, self.ids, kd_weight * self.grads + prob_weight * self.probs)


def sparse_fit(divergence: Divergence, logits: Tensor, signal: SparseSignal, reductions: Reductions) -> SparseFit:
    """The divergence over the kept entries and one bucket of all others, in one collective with all that is waiting.

    logits: (c, V), which become `others`. signal: of c tokens, no id twice in one. Over sampled entries the gradient is right on
    average, while the value exceeds the whole forward_kl by the entropy that the samples lack.

    The gradient of the bucket is shared among its entries by their softmax among themselves: nothing is divided by the bucket's
    p, which is 0 in fp32 if a student is surer than its teacher.
    """
    vocabulary = reductions.vocabulary
    kept = reductions.gather(logits, signal.ids)
    others = reductions.softmax_(vocabulary.lower_to_(logits, signal.ids, ABSENT))
    kept_logits = kept.result().masked_fill(signal.ids < 0, ABSENT)  # (c, k)
    buckets = bucket_fit(divergence, kept_logits, others.result().logsumexp, signal)
    probs, grads = buckets.probs, buckets.grads
    return SparseFit(
        buckets.value, buckets.lse, logits, probs[:, -1:], grads[:, -1:], signal.ids, probs[:, :-1], grads[:, :-1], vocabulary
    )


class BucketFit(NamedTuple):
    """value: (c, 1). lse: (c, 1), of all logits. probs, grads: (c, k + 1), softmax and gradient, at the end those of the tail."""

    value: Tensor
    lse: Tensor
    probs: Tensor
    grads: Tensor


def bucket_fit(divergence: Divergence, kept_logits: Tensor, others_lse: Tensor, signal: SparseSignal) -> BucketFit:
    """The divergence over the kept entries and one bucket of all others. (c, k), (c, 1), whole on every rank"""
    logits = torch.cat([kept_logits, others_lse], 1)
    lse = logits.logsumexp(1, keepdim=True)
    log_probs = logits - lse
    masses = torch.cat([signal.probs, signal.tail.unsqueeze(1)], 1).to(logits.dtype)
    teacher = masses.clamp_min_(torch.finfo(logits.dtype).tiny).log_()
    probs = log_probs.exp()
    value, grads = value_and_grad(divergence, log_probs, teacher, VocabularySlice.whole(logits.shape[1]).reductions())
    return BucketFit(value, lse, probs, grads)


def reference_sparse_value(divergence: Divergence, student: Tensor, signal: SparseSignal) -> Tensor:
    """The same by a loop over tokens, for autograd. student: log-probabilities (n, V) -> (n,)"""
    values = []
    for row, ids, probs, tail in zip(student, signal.ids, signal.probs.to(student.dtype), signal.tail, strict=True):
        buckets, masses = row[ids[ids >= 0]], probs[ids >= 0]
        if tail > 0:
            others = torch.ones_like(row, dtype=torch.bool)
            others[ids[ids >= 0]] = False
            buckets = torch.cat([buckets, row[others].exp().sum().log()[None]])
            masses = torch.cat([masses, tail.to(row.dtype)[None]])
        values.append(reference_value(divergence, buckets[None], masses.log()[None]))
    return torch.cat(values) if values else student.sum(1)
