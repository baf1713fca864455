"""BART's noises, each a function of all texts of a batch at once.

Differences from fairseq's implementation of Lewis et al. 2020: spans never overlap, so that exactly the share `mask` is masked in
the mean; a text has at most as many spans as masked words, so that only `insert` makes a source longer than its text; random
tokens are never special ones; there is no <s> in front.
"""

from __future__ import annotations

import math
from enum import IntEnum, auto

import numpy as np
import numpy.typing as npt

from dstrain.data.batching.permutation import IntArray
from dstrain.data.ragged import BoolArray, Ragged, positions_of, replace_runs, segments, smallest, starts_of, sums
from dstrain.data.tasks.config import Denoising
from dstrain.data.tasks.draws import Draws, choice
from dstrain.data.tasks.symbols import Symbols
from dstrain.data.tasks.task import MostTokens


class NoiseDraw(IntEnum):
    """Purposes of `Draws`."""

    MOVED = 0
    ORDER = auto()
    MASKED = auto()
    SPANS = auto()
    POSITIONS = auto()
    RANDOM = auto()
    TOKEN = auto()
    INSERTED = auto()
    INSERTIONS = auto()
    INSERTED_RANDOM = auto()
    INSERTED_TOKEN = auto()
    ROTATED = auto()
    OFFSET = auto()


class DenoisingTask:
    """The text as the target, and a noised copy as the source."""

    def __init__(self, config: Denoising, symbols: Symbols) -> None:
        self.config = config
        self._symbols = symbols
        self._mask_id = symbols.id_of(config.mask_token) if config.has_masks else -1
        self._ordinary = symbols.ordinary([self._mask_id])
        self._ends = symbols.sentence_ends(config.sentence_ends) if config.permute_sentences else None
        self._length_cdf = None if config.poisson_lambda is None else poisson_cdf(config.poisson_lambda)

    def __call__(self, texts: Ragged, draws: Draws) -> tuple[Ragged, Ragged]:
        """Noised texts, and the texts."""
        config, source = self.config, texts
        if self._ends is not None:
            source = permute_sentences(source, self._ends, config.permute_sentences, draws)
        if config.mask:
            source = self._mask_spans(source, draws)
        if config.insert:
            source = self._insert_masks(source, draws)
        if config.rotate:
            source = rotate(source, config.rotate, draws)
        return source, texts

    def lengths(self, lengths: IntArray, draws: Draws) -> tuple[IntArray, IntArray]:
        """At most the text's and all that may be inserted; the text's."""
        return lengths + np.ceil(self.config.insert * lengths).astype(np.int64), lengths

    def longest(self, length: int) -> MostTokens:
        """As `lengths`."""
        source = length + math.ceil(self.config.insert * length)
        return MostTokens(source, length, source + length)

    def _mask_spans(self, texts: Ragged, draws: Draws) -> Ragged:
        is_start = self._symbols.word_starts(texts) if self.config.unit == "word" else np.ones(len(texts.tokens), np.bool_)
        words = sums(is_start, texts.lengths)
        word_lengths = np.diff(np.append(np.flatnonzero(is_start), len(is_start)))
        masked = np.minimum(
            np.floor(self.config.mask * words + draws.one(NoiseDraw.MASKED)).astype(np.int64), np.maximum(words - 1, 0)
        )
        spans = single_spans(masked) if self._length_cdf is None else poisson_spans(masked, self._length_cdf, draws)
        # a run of words is a masked span, or one word that stays; spans are at random places among the runs
        runs = words - masked + spans.lengths
        is_span = smallest(draws.uniform(NoiseDraw.POSITIONS, runs), runs, spans.lengths)
        words_of_run = np.ones(len(is_span), np.int64)
        words_of_run[is_span] = spans.tokens
        tokens_of_run = sums(word_lengths, words_of_run)
        if self.config.replace == "nothing":
            return texts.select(~np.repeat(is_span, tokens_of_run))
        if self.config.replace == "token":
            is_masked = np.repeat(is_span, tokens_of_run)
            return texts._replace(tokens=np.where(is_masked, self._masks(texts.lengths, draws), texts.tokens))
        masks = self._masks(spans.lengths, draws)
        tokens, lengths = replace_runs(texts.tokens, tokens_of_run, is_span, masks)
        return Ragged(tokens, sums(lengths, runs))

    def _insert_masks(self, texts: Ragged, draws: Draws) -> Ragged:
        counts = np.floor(self.config.insert * texts.lengths + draws.one(NoiseDraw.INSERTED)).astype(np.int64)
        lengths = texts.lengths + counts
        is_mask = smallest(draws.uniform(NoiseDraw.INSERTIONS, lengths), lengths, counts)
        tokens = np.empty(len(is_mask), np.int64)
        tokens[~is_mask], tokens[is_mask] = texts.tokens, self._masks(counts, draws, inserted=True)
        return Ragged(tokens, lengths)

    def _masks(self, counts: IntArray, draws: Draws, *, inserted: bool = False) -> IntArray:
        """`counts` (b,) masks for each text, some of them random tokens."""
        if not self.config.random:
            return np.full(counts.sum(), self._mask_id)
        purposes = NoiseDraw.RANDOM, NoiseDraw.TOKEN
        if inserted:
            purposes = NoiseDraw.INSERTED_RANDOM, NoiseDraw.INSERTED_TOKEN
        is_random, token = (draws.uniform(purpose, counts) for purpose in purposes)
        return np.where(is_random < self.config.random, choice(self._ordinary, token), self._mask_id)


def permute_sentences(texts: Ragged, ends: BoolArray, share: float, draws: Draws) -> Ragged:
    """The share of the sentences of each text, rounded up, in a random order in their places. ends: (V,), of sentences."""
    is_end = ends[texts.tokens]
    is_end[:-1] &= ~is_end[1:]  # the last of several marks ends the sentence
    is_end[np.cumsum(texts.lengths)[texts.lengths > 0] - 1] = True
    sentences = sums(is_end, texts.lengths)
    bounds = np.concatenate(([0], np.flatnonzero(is_end) + 1))
    moves = smallest(draws.uniform(NoiseDraw.MOVED, sentences), sentences, np.ceil(share * sentences).astype(np.int64))
    chosen, keys = np.flatnonzero(moves), draws.uniform(NoiseDraw.ORDER, sentences)
    order = np.arange(len(moves))
    order[chosen] = chosen[np.lexsort((keys[chosen], segments(sentences)[chosen]))]
    lengths = np.diff(bounds)[order]
    return texts._replace(tokens=texts.tokens[np.repeat(bounds[order], lengths) + positions_of(lengths)])


def rotate(texts: Ragged, share: float, draws: Draws) -> Ragged:
    """That share of the texts begins at a random token but the first; what was before it follows at the end."""
    offsets = 1 + (draws.one(NoiseDraw.OFFSET) * (texts.lengths - 1)).astype(np.int64)
    offsets = np.where(draws.one(NoiseDraw.ROTATED) < share, offsets, 0)
    lengths = np.repeat(texts.lengths, texts.lengths)
    index = (positions_of(texts.lengths) + np.repeat(offsets, texts.lengths)) % np.maximum(lengths, 1)
    return texts._replace(tokens=texts.tokens[np.repeat(starts_of(texts.lengths), texts.lengths) + index])


def poisson_cdf(mean: float) -> npt.NDArray[np.float64]:
    """P(length <= k) for k = 0, 1, ... up to where no draw of 53 bits comes."""
    terms, number, probability = [], 0, math.exp(-mean)
    while number <= mean or probability > 2.0**-54:
        terms.append(probability)
        number += 1
        probability *= mean / number
    return np.cumsum(terms)[:-1]


def single_spans(masked: IntArray) -> Ragged:
    """`masked` (b,) spans of one word for each text."""
    return Ragged(np.ones(masked.sum(), np.int64), masked)


def poisson_spans(masked: IntArray, cdf: npt.NDArray[np.float64], draws: Draws) -> Ragged:
    """Lengths of spans that sum to `masked` (b,) for each text, at most so many of them; the last one is cut to fit.

    If so many do not reach the sum, spans of length 0 become words.
    """
    lengths = np.searchsorted(cdf, draws.uniform(NoiseDraw.SPANS, masked), side="right").astype(np.int64)
    lacking = np.maximum(masked - sums(lengths, masked), 0)
    is_empty = lengths == 0
    empty = Ragged(np.flatnonzero(is_empty), sums(is_empty, masked))
    lengths[empty.tokens[positions_of(empty.lengths) < np.repeat(lacking, empty.lengths)]] = 1
    before = np.cumsum(lengths) - lengths
    before -= np.repeat(np.append(before, 0)[starts_of(masked)], masked)
    rest = np.repeat(masked, masked) - before
    return Ragged(np.minimum(lengths, rest), masked).select(rest > 0)
