"""MASS: the decoder writes a fragment of the text that is masked in the source."""

from __future__ import annotations

from enum import IntEnum, auto

import numpy as np

from dstrain.data.batching.permutation import IntArray
from dstrain.data.ragged import Ragged, positions_of
from dstrain.data.tasks.config import Mass
from dstrain.data.tasks.draws import Draws, choice
from dstrain.data.tasks.symbols import Symbols
from dstrain.data.tasks.task import MostTokens


class MassDraw(IntEnum):
    """Purposes of `Draws`."""

    START = 0
    CHANGE = auto()
    TOKEN = auto()


class MassTask:
    """One fragment of every text, at a random place. A text of one token has an empty fragment."""

    def __init__(self, config: Mass, symbols: Symbols) -> None:
        self.config = config
        self._mask_id = symbols.id_of(config.mask_token)
        self._ordinary = symbols.ordinary([self._mask_id])

    def __call__(self, texts: Ragged, draws: Draws) -> tuple[Ragged, Ragged]:
        """Texts with the fragment masked, and the fragments."""
        counts = self._fragment(texts.lengths)
        first = (draws.one(MassDraw.START) * (texts.lengths - counts + 1)).astype(np.int64)
        offset = positions_of(texts.lengths) - np.repeat(first, texts.lengths)
        inside = (offset >= 0) & (offset < np.repeat(counts, texts.lengths))
        fragments = texts.select(inside)
        tokens = texts.tokens.copy()
        tokens[inside] = self._masked(fragments, draws)
        return Ragged(tokens, texts.lengths), fragments

    def lengths(self, lengths: IntArray, draws: Draws) -> tuple[IntArray, IntArray]:
        """Both are exact, and depend on nothing else."""
        return lengths, self._fragment(lengths)

    def longest(self, length: int) -> MostTokens:
        """As `lengths`."""
        fragment = int(self._fragment(np.array([length]))[0])
        return MostTokens(length, fragment, length + fragment)

    def _fragment(self, lengths: IntArray) -> IntArray:
        counts = np.maximum(np.round(self.config.share * lengths).astype(np.int64), 1)
        return np.minimum(counts, np.maximum(lengths - 1, 0))

    def _masked(self, fragments: Ragged, draws: Draws) -> IntArray:
        """Masks for the tokens of the fragments, but for the random and the unchanged ones."""
        change = draws.uniform(MassDraw.CHANGE, fragments.lengths)
        tokens = choice(self._ordinary, draws.uniform(MassDraw.TOKEN, fragments.lengths))
        masked = np.where(change < self.config.random, tokens, self._mask_id)
        return np.where(change >= 1 - self.config.unchanged, fragments.tokens, masked)
