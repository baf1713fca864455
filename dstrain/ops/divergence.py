"""How far a student's distribution p is from a teacher's q, with its slope; both over V types, both given as logarithms.

| kind | value | source |
|---|---|---|
| forward_kl | sum q log(q / p) | Hinton et al. 2015 |
| reverse_kl | sum p log(p / q) | Gu et al. 2024 (MiniLLM) |
| jensen_shannon | b sum q log(q / m) + (1 - b) sum p log(p / m), m = b q + (1 - b) p | Agarwal et al. 2024 (GKD) |
| total_variation | 1/2 sum abs(p - q) | Wen et al. 2023 (f-distill) |
| skew_kl | sum q log(q / m), m = a q + (1 - a) p | Ko et al. 2024 (DistiLLM) |

The convention of b = beta is GKD's: towards 0 the divergence behaves like forward_kl, towards 1 like reverse_kl. At both ends the
formula itself is 0; there stand its limits after division by b or by 1 - b, which are forward_kl and reverse_kl themselves.

The slope is the gradient with respect to the logits that p is the softmax of. With g = d value / d p it is p (g - sum p g).

Types with a tail teach every divergence, over k + 1 buckets of which the last holds all other types; joining types never makes
a divergence greater (data processing; Csiszar 1967). Drawn types teach forward_kl alone, for it is linear in q, so that they
give its slope without bias; the others would compare p with zeros that are not the teacher's.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dstrain.ops.teacher_signal import SparseSignal

DivergenceKind = Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "skew_kl"]


class Divergence(NamedTuple):
    """parameter: beta of jensen_shannon, alpha of skew_kl; the other kinds have none."""

    kind: DivergenceKind
    parameter: float = 0.0


ENDS: dict[tuple[str, float], DivergenceKind] = {
    ("jensen_shannon", 0.0): "forward_kl",
    ("jensen_shannon", 1.0): "reverse_kl",
    ("skew_kl", 0.0): "forward_kl",
}


def kind_of(divergence: Divergence) -> DivergenceKind:
    """Its kind, which at an end of its parameter is another one."""
    return ENDS.get(divergence, divergence.kind)


def value_and_slope(divergence: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """student, teacher: log-probabilities (c, V) -> value (c, 1), slope (c, V)."""
    kind, mix = kind_of(divergence), divergence.parameter
    if kind == "forward_kl":
        probs = teacher.exp()
        value = (teacher - student).mul_(probs).sum(1, keepdim=True)
        return value, student.exp().sub_(probs)
    probs = student.exp()
    if kind == "reverse_kl":
        gap = student - teacher
        value = (gap * probs).sum(1, keepdim=True)
        return value, gap.sub_(value).mul_(probs)
    if kind == "total_variation":
        difference = probs - teacher.exp()
        value = difference.abs().sum(1, keepdim=True).mul_(0.5)
        return value, _through_softmax(probs, difference.sign_().mul_(0.5))
    middle = student + math.log1p(-mix)
    torch.logaddexp(teacher + math.log(mix), middle, out=middle)
    value = (teacher - middle).mul_(teacher.exp()).sum(1, keepdim=True)
    if kind == "skew_kl":
        share = middle.neg_().add_(student).add_(teacher).exp_().mul_(1 - mix)  # (1 - a) p q / m
        return value, probs.mul_(share.sum(1, keepdim=True)).sub_(share)
    gap = middle.neg_().add_(student)
    value = mix * value + (1 - mix) * (gap * probs).sum(1, keepdim=True)
    return value, _through_softmax(probs, gap.mul_(1 - mix))


def _through_softmax(probs: Tensor, gradient: Tensor) -> Tensor:
    """From the gradient with respect to probabilities to that with respect to logits, in place."""
    return gradient.sub_((probs * gradient).sum(1, keepdim=True)).mul_(probs)


def reference_value(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """The table above in words of torch, for autograd. student, teacher: log-probabilities (n, V) -> (n,)"""
    p, q, mix = student.exp(), teacher.exp(), divergence.parameter
    match kind_of(divergence):
        case "forward_kl":
            terms = q * (teacher - student)
        case "reverse_kl":
            terms = p * (student - teacher)
        case "jensen_shannon":
            middle = (mix * q + (1 - mix) * p).log()
            terms = mix * q * (teacher - middle) + (1 - mix) * p * (student - middle)
        case "total_variation":
            terms = (p - q).abs() / 2
        case "skew_kl":
            terms = q * (teacher - (mix * q + (1 - mix) * p).log())
    return terms.sum(1)


ABSENT = -1e9
"""A logit that no type has."""


class SparseFit(NamedTuple):
    """A divergence from a sparse signal, by what is needed of the softmax p for its slope; (c, 1) but for those of the types.

    lse: what makes log-probabilities of logits when taken off. others: the softmax among the types that were not kept, (c, V), 0
    at those that were; they have p = share others and the slope factor others. ids, probs, slopes: the kept types with their p
    and slope, (c, k), 0 where unused.
    """

    value: Tensor
    lse: Tensor
    others: Tensor
    share: Tensor
    factor: Tensor
    ids: Tensor
    probs: Tensor
    slopes: Tensor

    def slope(self, taught: Tensor | float = 1.0, scored: Tensor | float = 0.0) -> Tensor:
        """`taught` times the slope plus `scored` times p, (c, V), in the place of `others`."""
        slope = self.others.mul_(taught * self.factor + scored * self.share)
        return slope.scatter_add_(1, self.ids, taught * self.slopes + scored * self.probs)


def sparse_fit(divergence: Divergence, logits: Tensor, signal: SparseSignal) -> SparseFit:
    """The divergence over the kept types and one bucket of all others.

    logits: (c, V), which become `others`. signal: of c rows, no type twice in one. Over drawn types the slope is right on
    average, while the value exceeds the whole forward_kl by the entropy that the draws lack.

    The slope of the bucket falls to its types by their softmax among themselves: nothing is divided by the bucket's p, which is 0
    in fp32 where a student is surer than its teacher.
    """
    used = signal.ids >= 0
    ids = signal.ids.clamp_min(0)
    kept = logits.gather(1, ids).masked_fill_(~used, ABSENT)  # (c, k)
    logits.scatter_reduce_(1, ids, torch.where(used, ABSENT, math.inf).to(logits.dtype), "amin")
    top = logits.amax(1, keepdim=True)
    others = torch.softmax(logits, 1, out=logits)
    rest = top - others.amax(1, keepdim=True).log_()  # (c, 1): logsumexp of the others
    buckets = torch.cat([kept, rest], 1)  # (c, k + 1)
    lse = buckets.logsumexp(1, keepdim=True)
    buckets -= lse
    masses = torch.cat([signal.probs, signal.tail.unsqueeze(1)], 1).to(logits.dtype)
    teacher = masses.clamp_min_(torch.finfo(logits.dtype).tiny).log_()
    value, slopes = value_and_slope(divergence, buckets, teacher)
    probs = buckets.exp()
    return SparseFit(value, lse, others, probs[:, -1:], slopes[:, -1:], ids, probs[:, :-1], slopes[:, :-1])


def reference_sparse_value(divergence: Divergence, student: Tensor, signal: SparseSignal) -> Tensor:
    """The same by a loop over rows, for autograd. student: log-probabilities (n, V) -> (n,)"""
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
