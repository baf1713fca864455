"""What tasks know of a tokenizer: ids of symbols, where words start, which tokens end a sentence, which are ordinary."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import count, takewhile

import numpy as np

from dstrain.data.batching.permutation import IntArray
from dstrain.data.ragged import BoolArray, Ragged, starts_of
from dstrain.data.tokenizers.tokenizer import WORD_START
from dstrain.errors import DataError
from dstrain.protocols import TextTokenizer

CONTINUES = "@@"
"""At the end of a piece of a word whose rest follows (subword-nmt)."""


class Symbols:
    """Tables of a tokenizer. key: of the task in the recipe, for messages."""

    def __init__(self, tokenizer: TextTokenizer, key: str) -> None:
        self._tokenizer = tokenizer
        self.key = key
        self._pieces = tokenizer.tokens(range(tokenizer.vocab_size))
        self._ids = {piece: number for number, piece in enumerate(self._pieces)}

    def id_of(self, symbol: str) -> int:
        """Raises DataError if the tokenizer has no such symbol."""
        if symbol not in self._ids:
            raise DataError(
                f"{self.key} needs the symbol {symbol!r}, which the tokenizer lacks: name it in data.tokenizer.user_symbols "
                f"(for a dictionary, append the line '{symbol} 0' to its file) and prepare again"
            )
        return self._ids[symbol]

    def numbered(self, pattern: str) -> IntArray:
        """Ids of the symbols `pattern` with 0, 1, 2, ... for {}, as many as there are; at least one, or DataError."""
        self.id_of(pattern.replace("{}", "0"))
        names = (pattern.replace("{}", str(number)) for number in count())
        return np.array([self._ids[name] for name in takewhile(self._ids.__contains__, names)])

    def ordinary(self, but: Collection[int]) -> IntArray:
        """All ids but these and the special ones."""
        own = self._tokenizer
        return np.setdiff1d(np.arange(len(self._pieces)), [own.bos_id, own.pad_id, own.eos_id, own.unk_id, *but])

    def sentence_ends(self, marks: Sequence[str]) -> BoolArray:
        """(V,) whether a token is one of the marks, also at the beginning of a word. DataError if none is."""
        table = np.isin([piece.removeprefix(WORD_START) for piece in self._pieces], marks)
        if not table.any():
            raise DataError(
                f"{self.key}.permute_sentences: the tokenizer has none of the tokens {', '.join(marks)}, so no sentence has an "
                "end; correct sentence_ends, or set permute_sentences: 0"
            )
        return table

    def word_starts(self, texts: Ragged) -> BoolArray:
        """Whether each token starts a word; the first of a text does. If the tokenizer does not split words, every token does."""
        begins, continues = self._words
        marks = begins[texts.tokens]
        marks[1:] &= ~continues[texts.tokens[:-1]]
        marks[starts_of(texts.lengths)[texts.lengths > 0]] = True
        return marks

    @cached_property
    def _words(self) -> tuple[BoolArray, BoolArray]:
        """(V,) whether a piece can begin a word, and whether the next piece goes on with its word."""
        begins = np.array([piece.startswith(WORD_START) for piece in self._pieces])
        continues = np.array([piece.endswith(CONTINUES) for piece in self._pieces])
        if begins.any():
            return begins, np.zeros_like(begins)
        return np.ones_like(begins), continues
