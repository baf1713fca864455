"""Constraints on the next token of a hypothesis, written into a step's log-probabilities as -inf.

In order: never padding; the penalty of <unk>; no EOS before the minimal length; no n-gram twice; and, above all of these, what is
forced: a given prefix, and EOS at the maximal length. A forced token keeps its own log-probability. EOS is never held back by
n-gram blocking, so that a hypothesis can always end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dstrain.generation.config import BeamSearchConfig, SamplingConfig
from dstrain.protocols import TextTokenizer


@dataclass(frozen=True)
class SpecialIds:
    """The target ids that generation treats specially. start: what the model reads first; None = eos. before: of every target."""

    pad: int
    eos: int
    unk: int
    start: int | None = None
    before: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: TextTokenizer, *, start: int | None = None) -> SpecialIds:
        """Those of the target tokenizer. start: of a direction that has its own."""
        before = tuple(tokenizer.encode_prefixes([""])[0])
        first = tokenizer.start_id if start is None else start
        return cls(pad=tokenizer.pad_id, eos=tokenizer.eos_id, unk=tokenizer.unk_id, start=first, before=before)

    @property
    def first(self) -> int:
        """The token in front of every hypothesis whose sentence has no other."""
        return self.eos if self.start is None else self.start

    def beginnings(self, starts: Sequence[int | None], rows_per_sentence: int, device: torch.device) -> Tensor:
        """Hypotheses of nothing but the start token. starts: of each of b sentences, None = `first`. (b, R, 1)"""
        own = torch.tensor([self.first if start is None else start for start in starts], device=device)
        return own[:, None, None].repeat(1, rows_per_sentence, 1)


class Constraints:
    """The rules of one batch, sentence by sentence.

    max_lengths: tokens before EOS of each sentence. prefix: (B, P) forced first tokens, padded with the pad id, which forces
    nothing; None for none.
    """

    def __init__(
        self,
        config: BeamSearchConfig | SamplingConfig,
        ids: SpecialIds,
        *,
        max_lengths: Sequence[int],
        prefix: Tensor | None,
        device: torch.device,
    ) -> None:
        self._config = config
        self._ids = ids
        self._ends = set(max_lengths)
        self.max_lengths = torch.tensor(max_lengths, device=device)  # (b,)
        self._prefix = torch.empty(len(max_lengths), 0, dtype=torch.long) if prefix is None else prefix
        self._prefix = self._prefix.to(device)

    def apply(self, log_probs: Tensor, history: Tensor) -> None:
        """Change log_probs (N, V) of the next token in place. history: (N, t), the start token and all tokens since."""
        step = history.shape[1] - 1
        log_probs.select(1, self._ids.pad).fill_(-torch.inf)
        if self._config.unk_penalty != 0:
            log_probs[:, self._ids.unk] -= self._config.unk_penalty
        forced = self._forced(step)
        rows_per_sentence = len(log_probs) // len(self.max_lengths)
        if forced is not None:
            forced = forced.repeat_interleave(rows_per_sentence)
            rows = (forced != self._ids.pad).nonzero()[:, 0]
            tokens = forced[rows]
            allowed = log_probs[rows, tokens]
        if step < self._config.min_length:
            log_probs.select(1, self._ids.eos).fill_(-torch.inf)
        if self._config.no_repeat_ngram:
            forbid_repetition(log_probs, history[:, 1:], self._config.no_repeat_ngram)
        if forced is not None:
            log_probs[rows] = -torch.inf
            log_probs[rows, tokens] = allowed

    def some_end(self, step: int) -> bool:
        """Whether a sentence may have reached its maximal length just now."""
        return step in self._ends

    def at_end(self, step: int) -> Tensor:
        """Which sentences have reached their maximal length. (b,)"""
        return self.max_lengths <= step

    def keep(self, sentences: Tensor) -> None:
        """Forget all sentences but these."""
        self.max_lengths = self.max_lengths[sentences]
        self._prefix = self._prefix[sentences]

    def _forced(self, step: int) -> Tensor | None:
        """The token that each sentence must take, pad if it is free; None if all are free. (b,)"""
        in_prefix = step < self._prefix.shape[1]
        if not in_prefix and step not in self._ends:
            return None
        free = torch.full_like(self.max_lengths, self._ids.pad)
        return torch.where(self.at_end(step), self._ids.eos, self._prefix[:, step] if in_prefix else free)


def forbid_repetition(log_probs: Tensor, tokens: Tensor, size: int) -> None:
    """Set to -inf, in place, every token that would complete an n-gram of `size` which `tokens` (N, t) already holds."""
    if tokens.shape[1] < size:
        return
    ngrams = tokens.unfold(1, size, 1)  # (N, t - size + 1, size)
    context = tokens[:, tokens.shape[1] - size + 1 :]  # (N, size - 1)
    rows, starts = (ngrams[:, :, :-1] == context[:, None]).all(2).nonzero(as_tuple=True)
    log_probs[rows, ngrams[rows, starts, -1]] = -torch.inf
