"""Reductions over the vocabulary: of all its entries, or of one slice per rank of a tensor group.

A token loss reduces over the vocabulary only through the `Reductions` of a `VocabularySlice`, so the same loss works on whole
logits and on slices. Each reduction computes the part of this slice at once and returns a `Pending`; the first result that is
read sends the parts of all in one all-reduce of a few numbers a token. A loss that asks for all it can before it reads a result
needs one collective for the normalizers, maxima included, and one for the sums that depend on them. For a whole vocabulary a
reduction is one kernel of torch, and nothing communicates. All ranks of the group make the same calls and get the same bits.

Shapes: c tokens, V entries of this slice, t ranks, k ids per token. Token ids are always those of the whole vocabulary; on their
way they are floats, exact below 2^24. Nothing here is recorded by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from dstrain.ops.kernels import ARGMAX
from dstrain.parallel.group import Group

_T = TypeVar("_T")


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

    @property
    def largest_slice(self) -> int:
        """Entries of the rank that holds most, the same number on all ranks."""
        return self.vocab_size if self.group is None else -(-self.vocab_size // self.group.size)

    def add_ranks(self, partial: Tensor) -> Tensor:
        """The sum of the ranks' partial results; may be in place. (...) -> (...)"""
        return partial if self.group is None else self.group.all_reduce(partial)

    def gather_ranks(self, own: Tensor) -> Tensor:
        """The values of all entries, on every rank. (..., V) -> (..., vocab_size)"""
        values = own.new_zeros(*own.shape[:-1], self.vocab_size)
        values[..., self.start : self.stop] = own
        return self.add_ranks(values)

    def reductions(self) -> Reductions:
        """New ones, for some tokens."""
        return Reductions(self)

    def entries(self, values: Tensor, ids: Tensor) -> Tensor:
        """The values of some entries, 0 for those that this slice does not hold. (c, V), (c, k) -> (c, k)"""
        local, inside = self._local(ids)
        return values.gather(1, local).masked_fill_(~inside, 0)

    def add_at_(self, values: Tensor, ids: Tensor, addend: Tensor | float) -> Tensor:
        """Add to some entries in place, as far as this slice holds them. (c, V), (c, k), (c, k) or a number"""
        local, inside = self._local(ids)
        return values.scatter_add_(1, local, inside.to(values.dtype) * addend)

    def lower_to_(self, values: Tensor, ids: Tensor, value: float) -> Tensor:
        """Lower some entries to `value` in place, as far as this slice holds them. (c, V), (c, k)"""
        local, inside = self._local(ids)
        return values.scatter_reduce_(1, local, torch.where(inside, value, math.inf).to(values.dtype), "amin")

    def rows(self, weight: Tensor) -> Tensor:
        """The rows of this slice of a whole projection's weight. (vocab_size, E) -> (V, E), a view"""
        return weight[self.start : self.stop]

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each id in this slice, any valid one for ids outside, and whether it is inside."""
        inside = (ids >= self.start) & (ids < self.stop)
        return (ids - self.start).clamp_(0, max(self.stop - self.start - 1, 0)), inside


class Pending(Generic[_T]):
    """What a reduction will give."""

    def __init__(self, reductions: Reductions) -> None:
        self._reductions = reductions
        self._result: list[_T] = []

    def set(self, result: _T) -> Pending[_T]:
        """From now on it is known."""
        self._result = [result]
        return self

    def result(self) -> _T:
        """The same on every rank. Collective if it is the first that is read since it was asked for."""
        if not self._result:
            self._reductions.run()
        return self._result[0]


class Reductions:
    """Reductions over the vocabulary that share collectives; see the head of this file.

    A method that writes into its argument has written what it says only once a result has been read.
    """

    def __init__(self, vocabulary: VocabularySlice) -> None:
        self.vocabulary = vocabulary
        self._waiting: list[tuple[Tensor, Callable[[Tensor], object]]] = []

    def run(self) -> None:
        """Combine all that is waiting, in one collective."""
        parts, finishers = zip(*self._waiting, strict=True)
        self._waiting = []
        combined = self.vocabulary.add_ranks(torch.cat(parts, 1))
        for finish, columns in zip(finishers, torch.split(combined, [part.shape[1] for part in parts], dim=1), strict=True):
            finish(columns)

    def add(self, partial: Tensor) -> Pending[Tensor]:
        """The sum of the ranks' partial results. (c, k) -> (c, k)"""
        return self._ask(partial, lambda total: total)

    def sum(self, values: Tensor) -> Pending[Tensor]:
        """(c, V) -> (c, 1)"""
        return self.add(values.sum(1, keepdim=True))

    def gather(self, values: Tensor, ids: Tensor) -> Pending[Tensor]:
        """The values of some entries; 0 for an id outside the vocabulary, such as -1. (c, V), (c, k) -> (c, k)"""
        return self.add(self.vocabulary.entries(values, ids))

    def argmax(self, values: Tensor) -> Pending[Tensor]:
        """The token id of the highest value, the first of equal ones. (c, V) -> (c, 1) int64"""
        local = ARGMAX.choose(values.device, values.dtype)(values)
        if self.vocabulary.group is None:
            return self._known(local)

        def first_highest(ranks: Tensor) -> Tensor:
            highest, ids = ranks.unbind(2)
            is_highest = highest == highest.amax(1, keepdim=True)
            return ids.masked_fill(~is_highest, self.vocabulary.vocab_size).amin(1, keepdim=True).long()

        ids = (local + self.vocabulary.start).to(values.dtype)
        return self._gather_ranks(torch.cat([values.gather(1, local), ids], 1), first_highest)

    def softmax_(self, logits: Tensor) -> Pending[Normalizer]:
        """Turn logits into probabilities in place. (c, V)"""
        highest = logits.amax(1, keepdim=True)
        torch.softmax(logits, 1, out=logits)
        own = Normalizer(highest, logits.amax(1, keepdim=True).log_().neg_())  # the highest is never 0: no infinity
        group = self.vocabulary.group
        if group is None:
            return self._known(own)

        def scale_by_share(ranks: Tensor) -> Normalizer:
            tops, log_sums = ranks.unbind(2)
            highest = tops.amax(1, keepdim=True)
            sums = (tops - highest).add_(log_sums).exp_()  # (c, t), of each rank's exp(z - highest)
            total = sums.sum(1, keepdim=True)
            logits.mul_(sums[:, group.rank, None] / total)
            return Normalizer(highest, total.log_())

        return self._gather_ranks(torch.cat(own, 1), scale_by_share)

    def log_softmax(self, logits: Tensor, *, out: Tensor) -> Pending[Tensor]:
        """Write log-probabilities into `out`, which may be the logits; gives the logsumexp. (c, V), (c, V) -> (c, 1)"""
        first = logits[:, :1].clone()
        torch.log_softmax(logits, 1, out=out)
        own = first.sub_(out[:, :1])  # any entry gives it, without another pass over the vocabulary
        if self.vocabulary.group is None:
            return self._known(own)

        def shift(ranks: Tensor) -> Tensor:
            ranks = ranks.squeeze(2)  # (c, t)
            out.sub_((ranks - own).logsumexp(1, keepdim=True))  # of all entries, above that of this slice: keeps its digits
            return ranks.logsumexp(1, keepdim=True)

        return self._gather_ranks(own, shift)

    def combine(self, own: Tensor, merge: Callable[[Tensor], _T]) -> Pending[_T]:
        """What `merge` makes of the numbers of every rank, (c, t, k), t = 1 for a whole vocabulary. own: of this rank, (c, k)"""
        return self._known(merge(own.unsqueeze(1))) if self.vocabulary.group is None else self._gather_ranks(own, merge)

    def _known(self, result: _T) -> Pending[_T]:
        """Of a whole vocabulary."""
        return Pending[_T](self).set(result)

    def _ask(self, part: Tensor, finish: Callable[[Tensor], _T]) -> Pending[_T]:
        """finish: from the sum of the ranks' parts (c, k) to the result."""
        if self.vocabulary.group is None:
            return self._known(finish(part))
        pending = Pending[_T](self)
        self._waiting.append((part, lambda total: pending.set(finish(total))))
        return pending

    def _gather_ranks(self, own: Tensor, finish: Callable[[Tensor], _T]) -> Pending[_T]:
        """finish: from every rank's own numbers (c, t, k) to the result."""
        group = self.vocabulary.group
        assert group is not None, "a whole vocabulary has one rank"
        ranks = own.new_zeros(len(own), group.size, own.shape[1])
        ranks[:, group.rank] = own
        return self._ask(ranks.flatten(1), lambda total: finish(total.view(ranks.shape)))
