"""The terms of a distillation of a chunk of logits: see `TokenDistillation`, whose temperature, weights and signals these take.

Dense signals: one read of the student's logits and one of each teacher's for the statistics, then those of `divergence.py`. The
plain softmax for cross-entropy comes out of the same reads. Sparse signals: the reads of cross-entropy.
"""

import torch
from torch import Tensor

from dstrain.ops.divergence import ABSENT, bucket_fit
from dstrain.ops.teacher_signal import SparseSignal
from dstrain.ops.token_loss.distillation import (
    DistillationTargets,
    DistillationTerms,
    StudentLosses,
    kd_factor,
    most_probable,
    teacher_log_probs,
    teacher_logits,
)
from dstrain.ops.triton.divergence import Tempered, divergence_gradient_
from dstrain.ops.triton.softmax import row_weights, softmax_gradient_, softmax_statistics
from dstrain.ops.vocabulary import Reductions


def triton_dense(logits: Tensor, targets: DistillationTargets, terms: DistillationTerms, reductions: Reductions) -> StudentLosses:
    """(c, V), of c tokens"""
    temperature, like = terms.temperature, logits
    pending = softmax_statistics(logits, targets.labels, reductions, temperature=temperature, with_plain=temperature != 1)
    teachers = teacher_logits(targets.signal, temperature, reductions.vocabulary, like=like)
    if len(teachers) > 1:  # their mean is no softmax of a mean of logits
        teachers = [(teacher_log_probs(targets.signal, temperature, reductions, like=like), 1.0)]
    ((teacher, divisor),) = teachers
    teacher_pending = softmax_statistics(teacher, None, reductions, temperature=divisor)
    statistics, teacher_statistics = pending.result(), teacher_pending.result()
    nll = statistics.max - statistics.label_logit + statistics.plain_log_sum
    value = divergence_gradient_(
        terms.divergence,
        Tempered(logits, temperature, statistics),
        Tempered(teacher, divisor, teacher_statistics),
        reductions,
        weight=row_weights(kd_factor(targets, terms), logits),
        plain_weight=terms.hard_weight,
    )
    agreement = statistics.best == teacher_statistics.best
    return StudentLosses(nll, statistics.max + statistics.plain_log_sum, value, agreement, logits)


def triton_sparse(
    logits: Tensor, targets: DistillationTargets, terms: DistillationTerms, reductions: Reductions
) -> StudentLosses:
    """(c, V), of c tokens. The kept entries are taken out of the logits, so that the statistics are of all others."""
    signal, vocabulary, temperature = targets.signal, reductions.vocabulary, terms.temperature
    assert isinstance(signal, SparseSignal)
    kept, label_logits = reductions.gather(logits, signal.ids), reductions.gather(logits, targets.labels)
    vocabulary.lower_to_(logits, signal.ids, ABSENT)
    with_plain = temperature != 1
    pending = softmax_statistics(logits, None, reductions, temperature=temperature, with_plain=with_plain)
    others, kept_logits = pending.result(), kept.result().masked_fill(signal.ids < 0, ABSENT)
    buckets = bucket_fit(terms.divergence, kept_logits / temperature, others.max / temperature + others.log_sum, signal)
    lse = buckets.lse
    if with_plain:
        lse = torch.cat([kept_logits, others.max + others.plain_log_sum], 1).logsumexp(1, keepdim=True)
        others = others._replace(plain_log_sum=lse - others.max)  # the plain softmax is that of all entries
    factor, hard_weight = kd_factor(targets, terms), terms.hard_weight
    kept_probs = (kept_logits - lse).exp_()
    weight = factor * buckets.grads[:, -1:] + (0.0 if with_plain else hard_weight) * buckets.probs[:, -1:]
    softmax_gradient_(logits, others, weight=weight, plain_weight=hard_weight if with_plain else 0.0, temperature=temperature)
    vocabulary.add_at_(logits, signal.ids, factor * buckets.grads[:, :-1] + hard_weight * kept_probs)
    best = _best(kept_logits, signal.ids, others.max, others.best, vocabulary.vocab_size)
    return StudentLosses(lse - label_logits.result(), lse, buckets.value, most_probable(signal) == best, logits)


def _best(kept_logits: Tensor, ids: Tensor, highest: Tensor, best: Tensor, vocab_size: int) -> Tensor:
    """The token id of the highest of the kept logits (c, k) and of all others (c, 1), the first of equal ones. -> (c, 1)"""
    logits, all_ids = torch.cat([kept_logits, highest], 1), torch.cat([ids, best], 1)
    return all_ids.masked_fill(logits != logits.amax(1, keepdim=True), vocab_size).amin(1, keepdim=True)
