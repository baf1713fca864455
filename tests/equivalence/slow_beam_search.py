"""Beam search for one sentence in plain Python: the slow twin of `generation/beam_search.py`, written from its description.

`as_predecessor` repeats three faults of the fairseq fork on a CPU, so that the golden values can be checked to the letter. Its
n-gram blocking compares with the padding at the end of its token buffer and so never blocks anything. In diverse beam search a
hypothesis that has ended goes on beyond EOS and shifts the groups of the others; and how often groups agreed at the first step
is stored by row but read by sentence number, so it is `borrowed` from another sentence of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PAD, EOS, UNK = 1, 2, 3
NextLogits = Callable[[Sequence[Sequence[int]]], list[list[float]]]


@dataclass
class Slow:
    """next_logits: token sequences of equal length, without the start token -> logits of each one's next token."""

    next_logits: NextLogits
    beam_size: int
    max_length: int
    min_length: int = 1
    length_penalty: float = 1.0
    normalized: bool = True
    temperature: float = 1.0
    unk_penalty: float = 0.0
    no_repeat_ngram: int = 0
    groups: int = 1
    diversity: float = 0.5
    prefix: Sequence[int] = ()
    as_predecessor: bool = False
    borrowed: dict[tuple[int, int], int] | None = None
    agreements: dict[tuple[int, int], int] = field(default_factory=dict)
    first_agreements: dict[tuple[int, int], int] = field(default_factory=dict)
    alive: list[int] = field(default_factory=list)

    def run(self) -> list[tuple[list[int], float, list[float]]]:
        """All finished hypotheses: tokens, score, score of each token; best first."""
        self.alive = [self.beam_size // self.groups] * self.groups
        beams: list[tuple[list[int], list[float]]] = [([], [])] * self.beam_size  # tokens, totals after each
        dead = [i >= self.groups for i in range(self.beam_size)]
        ignored = [False] * self.beam_size
        finished: list[tuple[list[int], list[float]]] = []
        while len(finished) < self.beam_size and len(beams[0][0]) <= self.max_length:
            tokens = [beam[0] for beam in beams]
            rows = [self.constrain(self.log_softmax(row), own) for row, own in zip(self.next_logits(tokens), tokens, strict=True)]
            totals = [-math.inf if dead[i] else [0.0, *beams[i][1]][-1] for i in range(self.beam_size)]
            candidates = self.candidates(rows, totals)
            if not tokens[0]:
                self.first_agreements = dict(self.agreements)
                self.agreements = dict(self.borrowed or self.agreements)
            ended = [token == EOS and total > -math.inf for total, token, _ in candidates]
            for i in range(self.beam_size):
                ended[i] = ended[i] and not ignored[i]
                if ended[i] and len(finished) < self.beam_size:
                    total, token, parent = candidates[i]
                    finished.append(([*beams[parent][0], token], [*beams[parent][1], total]))
            order = self.survivors(ended, ignored)
            ignored = [self.as_predecessor and (ended[i] or (i < self.beam_size and ignored[i])) for i in order]
            dead = [ended[i] and not self.as_predecessor for i in order]
            beams = [([*beams[p][0], token], [*beams[p][1], total]) for total, token, p in (candidates[i] for i in order)]
        scored = [(tokens, self.score(totals), differences(totals)) for tokens, totals in finished]
        return sorted(scored, key=lambda item: -item[1])

    def survivors(self, ended: list[bool], ignored: list[bool]) -> list[int]:
        """Which candidates go on."""
        if self.groups > 1 and not self.as_predecessor:
            for i in range(self.beam_size):
                self.alive[i % self.groups] -= ended[i]
            return list(range(self.beam_size))
        last = [flag or (i < self.beam_size and ignored[i]) for i, flag in enumerate(ended)]
        return sorted(range(len(ended)), key=lambda i: (last[i], i))[: self.beam_size]

    def score(self, totals: list[float]) -> float:
        return totals[-1] / len(totals) ** self.length_penalty if self.normalized else totals[-1]

    def log_softmax(self, logits: Sequence[float]) -> list[float]:
        scaled = [x / self.temperature for x in logits]
        peak = max(scaled)
        total = peak + math.log(sum(math.exp(x - peak) for x in scaled))
        return [x - total for x in scaled]

    def constrain(self, row: list[float], tokens: Sequence[int]) -> list[float]:
        step = len(tokens)
        row = list(row)
        row[PAD] = -math.inf
        row[UNK] -= self.unk_penalty
        forced = EOS if step == self.max_length else self.prefix[step] if step < len(self.prefix) else None
        if forced is not None:
            return [value if token == forced else -math.inf for token, value in enumerate(row)]
        if step < self.min_length:
            row[EOS] = -math.inf
        size = self.no_repeat_ngram
        if size and not self.as_predecessor and step >= size:
            seen = {tuple(tokens[i : i + size]) for i in range(step - size + 1)}
            context = tuple(tokens[step - size + 1 :])
            row = [-math.inf if (*context, token) in seen else value for token, value in enumerate(row)]
        return row

    def candidates(self, rows: list[list[float]], totals: list[float]) -> list[tuple[float, int, int]]:
        """(total, token, parent), best first; for groups interleaved."""
        if self.groups == 1:
            return self.best(rows, totals, range(self.beam_size), 2 * self.beam_size)
        size = self.beam_size // self.groups
        chosen: list[list[tuple[float, int, int]]] = []
        for group in range(self.groups):
            penalties: dict[int, float] = {}
            for earlier, picks in enumerate(chosen):
                for total, token, _ in picks:
                    if total > -math.inf:
                        price = self.diversity * (1 + self.agreements.get((group, earlier), 0))
                        penalties[token] = penalties.get(token, 0.0) + price
            cheaper = [[value - penalties.get(token, 0.0) for token, value in enumerate(row)] for row in rows]
            members = range(group, self.beam_size, self.groups)
            found = self.best(cheaper, totals, members, size)
            chosen.append([(t if i < self.alive[group] else -math.inf, w, p) for i, (t, w, p) in enumerate(found)])
        for a in range(self.groups):
            for b in range(self.groups):
                alike = sum(x[1] == y[1] and -math.inf not in (x[0], y[0]) for x, y in zip(chosen[a], chosen[b], strict=True))
                self.agreements[a, b] = self.agreements.get((a, b), 0) + alike
        return [chosen[group][i] for i in range(size) for group in range(self.groups)]

    @staticmethod
    def best(rows: list[list[float]], totals: list[float], members: Sequence[int], k: int) -> list[tuple[float, int, int]]:
        everything = [(totals[i] + value, token, i) for i in members for token, value in enumerate(rows[i])]
        return sorted(everything, key=lambda item: -item[0])[:k]


def differences(totals: list[float]) -> list[float]:
    return [after - before for before, after in zip([0.0, *totals[:-1]], totals, strict=True)]
