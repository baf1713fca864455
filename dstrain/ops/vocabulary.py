"""Reductions over the vocabulary: of all its entries, or of one slice per rank of a tensor group.

A token loss reduces over the vocabulary only through a `VocabularySlice`, so the same loss works on whole logits and on slices.
For a whole vocabulary each method is one kernel of torch and nothing communicates. For a slice it is the local reduction and one
collective of (c, 1) numbers; all ranks of the group then hold the same result and must make the same calls.

Shapes: c tokens, V entries of this slice, k ids per token. Token ids are always those of the whole vocabulary. Nothing here is
recorded by autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dstrain.ops.kernels import ARGMAX
from dstrain.parallel.group import Group


class Normalizer(NamedTuple):
    """The logsumexp of logits in two terms, so that the log-probability of a likely token keeps its digits. (c, 1) each.

    max: the highest logit; log_sum: log sum_v exp(z_v - max), between 0 and log V.
    """

    max: Tensor
    log_sum: Tensor

    @property
    def logsumexp(self) -> Tensor:
        """(c, 1)"""
        return self.max + self.log_sum

    def nll(self, logit: Tensor) -> Tensor:
        """The negative log-probability of an entry with this logit; finite, however unlikely it is. (c, 1) -> (c, 1)"""
        return self.max - logit + self.log_sum


class TopK(NamedTuple):
    """The k highest values of each row, descending, with their token ids. (c, k) each."""

    values: Tensor
    ids: Tensor


@dataclass(frozen=True)
class VocabularySlice:
    """Entries `start` to `stop` - 1 of `vocab_size`. group: the ranks that hold the others; None for a whole vocabulary."""

    start: int
    stop: int
    vocab_size: int
    group: Group | None = None

    @classmethod
    def whole(cls, vocab_size: int) -> VocabularySlice:
        """All entries."""
        return cls(0, vocab_size, vocab_size)

    def __len__(self) -> int:
        """Entries of this slice."""
        return self.stop - self.start

    def add_ranks(self, partial: Tensor) -> Tensor:
        """The sum of the ranks' partial results; may be in place. (...) -> (...)"""
        return partial if self.group is None else self.group.all_reduce(partial)

    def gather_ranks(self, own: Tensor) -> Tensor:
        """The values of all entries, on every rank. (..., V) -> (..., vocab_size)"""
        values = own.new_zeros(*own.shape[:-1], self.vocab_size)
        values[..., self.start : self.stop] = own
        return self.add_ranks(values)

    def max(self, values: Tensor) -> Tensor:
        """(c, V) -> (c, 1)"""
        highest = values.amax(1, keepdim=True)
        return highest if self.group is None else self.group.max(highest)

    def sum(self, values: Tensor) -> Tensor:
        """(c, V) -> (c, 1)"""
        return self.add_ranks(values.sum(1, keepdim=True))

    def logsumexp(self, logits: Tensor) -> Tensor:
        """(c, V) -> (c, 1)"""
        if self.group is None:
            return logits.logsumexp(1, keepdim=True)
        highest = self.max(logits)
        return self.sum((logits - highest).exp_()).log_().add_(highest)

    def softmax_(self, logits: Tensor) -> Normalizer:
        """Turn logits into probabilities in place. (c, V)"""
        if self.group is None:
            highest = logits.amax(1, keepdim=True)
            torch.softmax(logits, 1, out=logits)
            return Normalizer(highest, logits.amax(1, keepdim=True).log_().neg_())  # the highest is never 0: no infinity
        highest = self.max(logits)
        total = self.sum(logits.sub_(highest).exp_())
        logits.div_(total)
        return Normalizer(highest, total.log_())

    def softmax_with_(self, logits: Tensor, ids: Tensor, partial: Tensor) -> tuple[Normalizer, Tensor, Tensor]:
        """`softmax_`, the logits of some entries before it, and the sum of the ranks' partial results, in two collectives.

        (c, V), (c, 1), (c, 1) -> the normalizer, (c, 1), (c, 1)
        """
        local, inside = self._local(ids)
        at_ids = logits.gather(1, local).masked_fill_(~inside, 0)
        if self.group is None:
            return self.softmax_(logits), at_ids, partial
        highest = self.max(logits)
        own = logits.sub_(highest).exp_().sum(1, keepdim=True)
        total, at_ids, summed = torch.split(self.add_ranks(torch.cat([own, at_ids, partial], 1)), 1, dim=1)
        logits.div_(total)
        return Normalizer(highest, total.log()), at_ids, summed

    def log_softmax(self, logits: Tensor, *, out: Tensor) -> Tensor:
        """Write log-probabilities into `out`, which may be the logits; returns the logsumexp. (c, V), (c, V) -> (c, 1)"""
        if self.group is None:
            first = logits[:, :1].clone()
            torch.log_softmax(logits, 1, out=out)
            return first.sub_(out[:, :1])  # any entry gives it, without another pass over the vocabulary
        normalizer = self.logsumexp(logits)
        torch.sub(logits, normalizer, out=out)
        return normalizer

    def gather(self, values: Tensor, ids: Tensor) -> Tensor:
        """The values of some entries; 0 for an id outside the vocabulary, such as -1. (c, V), (c, k) -> (c, k)"""
        local, inside = self._local(ids)
        return self.add_ranks(values.gather(1, local).masked_fill_(~inside, 0))

    def add_at_(self, values: Tensor, ids: Tensor, addend: Tensor | float) -> Tensor:
        """Add to some entries in place, as far as this slice holds them. (c, V), (c, k), (c, k) or a number"""
        local, inside = self._local(ids)
        return values.scatter_add_(1, local, inside.to(values.dtype) * addend)

    def lower_to_(self, values: Tensor, ids: Tensor, value: float) -> Tensor:
        """Lower some entries to `value` in place, as far as this slice holds them. (c, V), (c, k)"""
        local, inside = self._local(ids)
        return values.scatter_reduce_(1, local, torch.where(inside, value, math.inf).to(values.dtype), "amin")

    def argmax(self, values: Tensor) -> Tensor:
        """The token id of the highest value, the first of equal ones. (c, V) -> (c, 1) int64"""
        local = ARGMAX.choose(values.device, values.dtype)(values)
        if self.group is None:
            return local
        own = values.gather(1, local)
        highest = self.group.max(own.clone())
        ids = torch.where(own == highest, local + self.start, self.vocab_size)
        return self.group.max(ids.neg_()).neg()  # the lowest id

    def top_k(self, values: Tensor, k: int) -> TopK:
        """The k highest values. (c, V) -> (c, k), k at most `vocab_size`"""
        if self.group is None:
            return TopK(*values.topk(k, dim=1))
        local = values.topk(min(k, values.shape[1]), dim=1)
        candidates = values.new_full((len(values), self.group.size, k), -math.inf)
        candidates[:, self.group.rank, : local.values.shape[1]] = local.values
        ids = local.indices.new_zeros(candidates.shape)
        ids[:, self.group.rank, : local.indices.shape[1]] = local.indices + self.start
        best = self.group.max(candidates.flatten(1)).topk(k, dim=1)
        return TopK(best.values, self.group.all_reduce(ids.flatten(1)).gather(1, best.indices))

    def rows(self, weight: Tensor) -> Tensor:
        """The rows of this slice of a whole projection's weight. (vocab_size, E) -> (V, E), a view"""
        return weight[self.start : self.stop]

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each id in this slice, any valid one for ids outside, and whether it is inside."""
        inside = (ids >= self.start) & (ids < self.stop)
        return (ids - self.start).clamp_(0, max(self.stop - self.start - 1, 0)), inside
