"""Beam search over a batch of sentences, all hypotheses of all sentences at once.

At each step a sentence has K hypotheses. Of their best 2 K continuations, those that end among the first K are finished, and the
first K that do not end go on; so K hypotheses go on even if K ended. A sentence is done when K hypotheses are finished, at its
maximal length, when nothing allowed is left, or when nothing that goes on can still be among the `num_best`. It then leaves the
batch, and the others run on in smaller tensors. The score of a hypothesis is its summed log-probability divided by
length ** length_penalty, EOS counted.

How well a hypothesis may still end is bounded: what it gains by a further token is a log-probability, less penalties, so at most
0, and its sum divided by length ** length_penalty is monotone in the length, so it is highest at the next length or at the last.
Rounding is monotone too, and of equal scores the one that finished first is kept, so the result is exactly that of a search that
goes on. With a negative `unk_penalty` a sum may rise, and no search ends like this.

Diverse beam search (Vijayakumar et al., 2018) splits the K hypotheses into G groups, hypothesis i into group i mod G. The groups
choose one after the other, and a group pays `diversity` for each token that an earlier group chose at this step, once more for
each earlier step at which the two had chosen alike. A group finishes K / G hypotheses: one that ends frees its slot, and
nothing is ever continued beyond EOS. Scores contain these penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dstrain.batch import Sequences
from dstrain.generation.candidates import best_continuations, to_log_probs
from dstrain.generation.config import BeamSearchConfig
from dstrain.generation.constraints import Constraints, SpecialIds
from dstrain.generation.finished import FinishedHypotheses, normalized_scores
from dstrain.generation.hypothesis import Hypothesis
from dstrain.ops.kernels import EXTENSION
from dstrain.protocols import Generative


class Candidates(NamedTuple):
    """Continuations of each sentence, those that may finish in the first K columns. Each (b, C).

    totals: summed log-probabilities, -inf for none. tokens: the last token. parents: which hypothesis is continued.
    """

    totals: Tensor
    tokens: Tensor
    parents: Tensor


class Pruning(Protocol):
    """How continuations are chosen: all against all, or by groups."""

    def start(self, num_sentences: int, device: torch.device) -> Tensor:
        """Totals before the first token: 0 for a hypothesis that starts, -inf for others. (b, R), R <= K"""
        ...

    def candidates(self, log_probs: Tensor, totals: Tensor) -> Candidates:
        """The continuations worth keeping. log_probs: (b * R, V); totals: (b, R)"""
        ...

    def survivors(self, candidates: Candidates, ended: Tensor) -> Candidates:
        """The K that go on. ended: (b, C)"""
        ...

    def keep(self, sentences: Tensor) -> None:
        """Forget all sentences but these."""
        ...


class PlainPruning:
    """The best 2 K continuations of K hypotheses."""

    def __init__(self, beam_size: int) -> None:
        self.beam_size = beam_size

    def start(self, num_sentences: int, device: torch.device) -> Tensor:
        """One hypothesis, the empty one."""
        return torch.zeros(num_sentences, 1, device=device)

    def candidates(self, log_probs: Tensor, totals: Tensor) -> Candidates:
        """Best first."""
        return Candidates(*best_continuations(log_probs, totals, 2 * self.beam_size))

    def survivors(self, candidates: Candidates, ended: Tensor) -> Candidates:
        """The first K that did not end."""
        order = torch.arange(ended.shape[1], device=ended.device)
        order = (order + ended * len(order)).topk(self.beam_size, dim=1, largest=False).indices
        totals, tokens, parents = (x.gather(1, order) for x in candidates)
        return Candidates(totals.masked_fill(ended.gather(1, order), -torch.inf), tokens, parents)

    def keep(self, sentences: Tensor) -> None:
        """Nothing to forget."""


class DiversePruning:
    """Groups that choose in turn and avoid what earlier groups chose."""

    def __init__(self, beam_size: int, groups: int, diversity: float) -> None:
        self.groups = groups
        self.group_size = beam_size // groups
        self.diversity = diversity
        self._alive = torch.empty(0)  # (b, G) hypotheses of each group that have not finished
        self._agreements = torch.empty(0)  # (b, G, G) earlier steps at which two groups chose alike

    def start(self, num_sentences: int, device: torch.device) -> Tensor:
        """The first hypothesis of each group starts."""
        totals = torch.full((num_sentences, self.group_size * self.groups), -torch.inf, device=device)
        totals[:, : self.groups] = 0
        self._alive = torch.full((num_sentences, self.groups), self.group_size, device=device)
        self._agreements = torch.zeros(num_sentences, self.groups, self.groups, device=device)
        return totals

    def candidates(self, log_probs: Tensor, totals: Tensor) -> Candidates:
        """As many for each group as it has unfinished hypotheses; column i belongs to group i mod G."""
        by_hypothesis = log_probs.view(*totals.shape, -1)  # (b, K, V)
        rank = torch.arange(self.group_size, device=log_probs.device)
        chosen: list[Candidates] = []
        for group in range(self.groups):
            own = slice(group, None, self.groups)
            penalties = self._penalties(chosen, log_probs.shape[1])  # (b, V)
            reduced = (by_hypothesis[:, own] - penalties[:, None]).flatten(0, 1)
            best_totals, tokens, parents = best_continuations(reduced, totals[:, own], self.group_size)
            best_totals = best_totals.masked_fill(rank >= self._alive[:, group, None], -torch.inf)
            chosen.append(Candidates(best_totals, tokens, parents * self.groups + group))
        stacked = [torch.stack(parts, 2) for parts in zip(*chosen, strict=True)]  # 3 times (b, K / G, G)
        alive = stacked[0] > -torch.inf
        alike = (stacked[1][..., None] == stacked[1][..., None, :]) & alive[..., None] & alive[..., None, :]
        self._agreements += alike.sum(1)
        return Candidates(*(part.flatten(1) for part in stacked))

    def survivors(self, candidates: Candidates, ended: Tensor) -> Candidates:
        """Every column keeps its index; those that ended are dead."""
        self._alive = self._alive - ended.view(-1, self.group_size, self.groups).sum(1)
        return candidates._replace(totals=candidates.totals.masked_fill(ended, -torch.inf))

    def keep(self, sentences: Tensor) -> None:
        """Forget the groups of all sentences but these."""
        self._alive = self._alive[sentences]
        self._agreements = self._agreements[sentences]

    def _penalties(self, chosen: Sequence[Candidates], vocab_size: int) -> Tensor:
        """The penalty of each token for the next group, by the choices of the groups before it. (b, V)"""
        penalties = self._agreements.new_zeros(len(self._agreements), vocab_size)
        group = len(chosen)
        for earlier, candidates in enumerate(chosen):
            price = self.diversity * (1 + self._agreements[:, group, earlier, None]) * (candidates.totals > -torch.inf)
            penalties.scatter_add_(1, candidates.tokens, price)
        return penalties


class _Beams:
    """The hypotheses of the sentences still in the batch."""

    def __init__(
        self,
        config: BeamSearchConfig,
        constraints: Constraints,
        finished: FinishedHypotheses,
        ids: SpecialIds,
        starts: Sequence[int | None],
    ) -> None:
        num_sentences, device = len(finished.count), finished.count.device
        self.pruning = _pruning(config)
        self.constraints = constraints
        self.finished = finished
        self.some_finished = False
        self.config = config
        self.eos_id = ids.eos
        self.sentences = torch.arange(num_sentences, device=device)
        self.totals = self.pruning.start(num_sentences, device)  # (b, R), R = K after the first step
        self.history = self.totals[:, :, None][:, :, :0]  # (b, R, t) totals after each token
        self.tokens = ids.beginnings(starts, self.totals.shape[1], device)  # (b, R, 1 + t), the start token first

    def inputs(self) -> Tensor:
        """The next input of the model. (b * R, 1)"""
        return self.tokens[:, :, -1].reshape(-1, 1)

    def advance(self, log_probs: Tensor) -> tuple[Tensor | None, Tensor]:
        """Continue by one token. log_probs: (b * R, V), changed in place.

        Returns which sentences stay (None: all) and, for the rows of those, which row each continues.
        """
        self.constraints.apply(log_probs, self.tokens.flatten(0, 1))
        candidates = self.pruning.candidates(log_probs, self.totals)
        ended = (candidates.tokens == self.eos_id) & (candidates.totals > -torch.inf)
        if bool(ended.any()):
            self._finish(candidates, ended)
            chosen = self.pruning.survivors(candidates, ended)
        else:
            chosen = Candidates(*(x[:, : self.config.beam_size] for x in candidates))
        done = (chosen.totals == -torch.inf).all(1)
        if self.constraints.some_end(self.history.shape[2]):
            done |= self.constraints.at_end(self.history.shape[2])
        if self.some_finished:
            done |= self.finished.is_full(self.sentences)
            if self.config.unk_penalty >= 0:
                done |= self._highest_scores(chosen.totals) <= self.finished.least(self.sentences)
        staying = None
        if bool(done.any()):
            staying = (~done).nonzero()[:, 0]
            chosen = Candidates(*(x[staying] for x in chosen))
            self._keep(staying)
        return staying, self._extend(chosen)

    def _finish(self, candidates: Candidates, ended: Tensor) -> None:
        """Put away the hypotheses that end among the first K candidates."""
        beam_size = self.finished.capacity
        self.some_finished = True
        first = Candidates(*(x[:, :beam_size] for x in candidates))
        tokens = torch.cat([_pick(self.tokens, first.parents)[:, :, 1:], first.tokens[:, :, None]], 2)
        totals = torch.cat([_pick(self.history, first.parents), first.totals[:, :, None]], 2)
        self.finished.add(self.sentences, ended[:, :beam_size], tokens, totals)

    def _highest_scores(self, totals: Tensor) -> Tensor:
        """What no end of these hypotheses exceeds; -inf if all are dead. totals: (b, K), one token longer than now -> (b,)"""
        most = totals.amax(1)
        last_lengths = self.constraints.max_lengths + 1  # with EOS
        next_lengths = torch.full_like(last_lengths, self.history.shape[2] + 2)
        bounds = [normalized_scores(most, lengths, self.config) for lengths in (next_lengths, last_lengths)]
        return torch.maximum(*bounds)

    def _keep(self, sentences: Tensor) -> None:
        self.sentences = self.sentences[sentences]
        self.totals, self.tokens, self.history = self.totals[sentences], self.tokens[sentences], self.history[sentences]
        self.constraints.keep(sentences)
        self.pruning.keep(sentences)

    def _extend(self, chosen: Candidates) -> Tensor:
        """Replace the hypotheses by the chosen continuations; returns the row that each row continues. (b * K,)"""
        first_row = torch.arange(0, self.totals.numel(), self.totals.shape[1], device=self.totals.device)
        rows = (first_row[:, None] + chosen.parents).flatten()
        extend = EXTENSION.choose(rows.device, self.history.dtype)
        self.tokens, self.history = extend(self.tokens, self.history, rows, chosen.tokens, chosen.totals)
        self.totals = chosen.totals
        return rows


def _pick(x: Tensor, parents: Tensor) -> Tensor:
    """The hypotheses `parents` (b, n) of each sentence. (b, K, t) -> (b, n, t)"""
    return x.gather(1, parents[:, :, None].expand(-1, -1, x.shape[2]))


@torch.inference_mode()
def beam_search(
    model: Generative,
    source: Sequences | None,
    *,
    config: BeamSearchConfig,
    ids: SpecialIds,
    max_lengths: Sequence[int],
    prefix: Tensor | None = None,
    starts: Sequence[int | None] | None = None,
) -> list[list[Hypothesis]]:
    """The `num_best` hypotheses of each sentence, best first.

    source: None for decoder-only models, whose prompts are prefixes. max_lengths: the most tokens before EOS of each sentence.
    prefix: (B, P) forced first tokens, padded with the pad id; their scores count. starts: what the model reads first for each
    sentence, None = `ids.first`. A sentence for which nothing of finite score can be said (NaN logits, or constraints that
    exclude everything) has an empty list.
    """
    anchor = prefix if source is None else source.tokens
    if anchor is None:
        raise ValueError("generation needs a source or a prefix")
    constraints = Constraints(config, ids, max_lengths=max_lengths, prefix=prefix, device=anchor.device)
    finished = FinishedHypotheses(
        config, num_sentences=len(max_lengths), capacity=config.beam_size, max_length=max(max_lengths) + 1, device=anchor.device
    )
    beams = _Beams(config, constraints, finished, ids, starts or [None] * len(max_lengths))
    state = model.start(
        source, num_sentences=len(max_lengths), rows_per_sentence=beams.totals.shape[1], max_length=max(max_lengths) + 1
    )
    while True:
        logits = model.step(beams.inputs(), state)[:, -1]
        staying, rows = beams.advance(to_log_probs(logits, config.temperature))
        if not len(beams.sentences):
            return finished.best()
        if staying is not None:
            state.keep(staying)
        state.reorder(rows)


def _pruning(config: BeamSearchConfig) -> Pruning:
    if config.groups > 1:
        return DiversePruning(config.beam_size, config.groups, config.diversity)
    return PlainPruning(config.beam_size)
