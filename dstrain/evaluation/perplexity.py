"""Perplexity of text under a language model, by sliding windows.

A model reads its start token and then a document, of which every line ends in EOS. EOS is scored like any token: it is the end of
the line. A document of more tokens than a window is read in windows whose ends are `stride` tokens apart. A window scores the
tokens that no window before it has scored; the others are their context. So every token is scored once, and a token of the second
window or a later one has at least `length - stride` tokens before it. The last window begins earlier instead of being shorter.

Positions count from the beginning of a window. A long document costs `length / stride` forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dstrain.data.batching.collate import Collator
from dstrain.data.batching.plan import batches_by_length
from dstrain.data.ragged import Ragged, positions_of
from dstrain.data.tokenizers.unknown import UnknownTokens
from dstrain.ops.token_loss.cross_entropy import linear_nll
from dstrain.protocols import TeacherForced, TextTokenizer

BUFFERED_BATCHES = 8
"""Windows of so many batches are sorted by length together, so that batches have little padding."""
LONGEST_EXPONENT = 700.0


class TokenWindow(NamedTuple):
    """What a model reads at once. inputs: (w,) tokens. labels: what follows each of the last `len(labels)` of them."""

    inputs: list[int]
    labels: list[int]


@dataclass
class TextScore:
    """What a text costs under a model. nll: of all tokens, in nats.

    num_tokens: scored ones, the EOS of each line among them. num_words: between white space; the ends of lines are none.
    num_bytes: of the lines in UTF-8, with one for each end. num_lines: scored ones; blank_lines: left out, as in training.
    """

    nll: float = 0.0
    num_tokens: int = 0
    num_words: int = 0
    num_bytes: int = 0
    num_lines: int = 0
    blank_lines: int = 0
    unknown: UnknownTokens = field(default_factory=UnknownTokens)

    def figures(self) -> dict[str, float]:
        """perplexity: exp(nll / tokens), word_perplexity: exp(nll / words), bits_per_byte: nll / (ln 2 x bytes), and the counts.

        Bits per byte do not depend on the tokenizer, except that <unk> costs less than the text that it replaces.
        """
        return {
            "perplexity": _exp(self.nll / self.num_tokens),
            "word_perplexity": _exp(self.nll / max(self.num_words, 1)),
            "bits_per_byte": self.nll / (math.log(2) * self.num_bytes),
            "nll": self.nll,
            "num_tokens": self.num_tokens,
            "num_words": self.num_words,
            "num_bytes": self.num_bytes,
            "num_lines": self.num_lines,
            "blank_lines": self.blank_lines,
            "unknown_tokens": self.unknown.unknown,
        }

    def add_line(self, line: str, ids: Sequence[int], unk_id: int) -> None:
        """Count a line that is scored."""
        self.num_lines += 1
        self.num_words += len(line.split())
        self.num_bytes += len(line.encode()) + 1
        self.unknown.add([ids], unk_id)


def _exp(nll: float) -> float:
    return math.exp(min(nll, LONGEST_EXPONENT))


def sliding_windows(pieces: Iterable[Sequence[int]], start_id: int, *, length: int, stride: int) -> Iterator[TokenWindow]:
    """The windows of one document of at least one token, of which `length` and a piece are in memory at a time.

    pieces: its tokens, in order. start_id: what the model reads before them. 1 <= stride <= length.
    """
    tokens, scored, end = [start_id], 0, length  # labels are tokens[scored + 1 : end + 1]
    for piece in pieces:
        tokens += piece
        while end < len(tokens):
            yield _window(tokens, scored, end, length)
            scored, end = end, end + stride
        passed = max(0, scored - length)
        tokens, scored, end = tokens[passed:], scored - passed, end - passed
    if scored + 1 < len(tokens):
        yield _window(tokens, scored, len(tokens) - 1, length)


def _window(tokens: Sequence[int], scored: int, end: int, length: int) -> TokenWindow:
    return TokenWindow(list(tokens[max(0, end - length) : end]), list(tokens[scored + 1 : end + 1]))


@torch.inference_mode()
def window_nll(model: TeacherForced, windows: Sequence[TokenWindow], collator: Collator, device: torch.device) -> Tensor:
    """The negative log-likelihood of each label, window after window, in nats. (n,)"""
    inputs, labels = (Ragged.of([window[side] for window in windows]) for side in (0, 1))
    reading = collator.read(Ragged.of([[collator.start_id]] * len(windows)), inputs)
    is_scored = positions_of(inputs.lengths) >= np.repeat(inputs.lengths - labels.lengths, inputs.lengths)
    index = torch.from_numpy(reading.target_index[is_scored]).to(device)
    hidden = model(None, reading.target.to(device)).hidden.flatten(0, -2).index_select(0, index)  # (n, D)
    targets = torch.from_numpy(labels.tokens).to(device)
    nll: Tensor = model.reduce_projection(hidden, partial(linear_nll, labels=targets, chunk_tokens="auto"))
    return nll


class PerplexityScorer:
    """Scores text by one decoder-only model, in evaluation mode on `device`.

    length, stride: of windows, in tokens. max_tokens: padded tokens of a batch; a longer window is a batch of its own.
    """

    def __init__(
        self,
        model: TeacherForced,
        tokenizer: TextTokenizer,
        collator: Collator,
        device: torch.device,
        *,
        length: int,
        stride: int,
        max_tokens: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._collator = collator
        self._device = device
        self._windows = partial(sliding_windows, start_id=collator.start_id, length=length, stride=stride)
        self._max_tokens = max_tokens

    def __call__(self, chunks: Iterable[Sequence[str]], *, across_lines: bool, progress: Callable[[int], object]) -> TextScore:
        """The score of all lines; nothing is divided, so a text without tokens has nll 0.

        chunks: the lines, some at a time. across_lines: one document instead of one for each line. progress: called with the
        number of lines that were read.
        """
        score = TextScore()
        lines = self._encoded(chunks, score, progress)
        documents: Iterable[Iterable[Sequence[int]]] = [lines] if across_lines else ([line] for line in lines)
        buffered: list[TokenWindow] = []
        size = 0
        for window in (window for document in documents for window in self._windows(document)):
            buffered.append(window)
            size += len(window.inputs)
            if size >= BUFFERED_BATCHES * self._max_tokens:
                self._add(buffered, score)
                buffered, size = [], 0
        self._add(buffered, score)
        return score

    def _encoded(
        self, chunks: Iterable[Sequence[str]], score: TextScore, progress: Callable[[int], object]
    ) -> Iterator[Sequence[int]]:
        """The tokens of each line that is not blank, with EOS."""
        for lines in chunks:
            for line, ids in zip(lines, self._tokenizer.encode(lines), strict=True):
                progress(1)
                if ids:
                    score.add_line(line, ids, self._tokenizer.unk_id)
                    yield [*ids, self._tokenizer.eos_id]
                else:
                    score.blank_lines += 1

    def _add(self, windows: Sequence[TokenWindow], score: TextScore) -> None:
        lengths = [len(window.inputs) for window in windows]
        for rows in batches_by_length(lengths, range(len(windows)), self._max_tokens):
            nll = window_nll(self._model, [windows[row] for row in rows], self._collator, self._device)
            score.nll += float(nll.double().sum())
            score.num_tokens += len(nll)
