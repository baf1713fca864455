"""How much of a text its tokenizer does not know, and what the reason may be."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dstrain.data.tokenizers.dictionary_file import Markers
from dstrain.data.tokenizers.tokenizer import WORD_START, DictionaryTokenizer
from dstrain.log import logger

if TYPE_CHECKING:  # so that `prepare` names a missing file without loading torch
    from dstrain.protocols import TextTokenizer

MANY = 0.02
"""Share of <unk> above which something is wrong with the text or its tokenizer."""
LANGUAGE = r"[a-z]{2,3}([_-]\w+)?"
TAG = re.compile(rf"<2{LANGUAGE}>|__{LANGUAGE}__|\[{LANGUAGE}\]|>>{LANGUAGE}<<|[a-z]{{3}}_[A-Z][a-z]{{3}}")
"""How corpora spell the tag of a language: <2en>, __en__, [en_XX], >>eng<<, eng_Latn."""


@dataclass
class UnknownTokens:
    """A count of tokens, without EOS, and of those that are <unk>."""

    tokens: int = 0
    unknown: int = 0

    def add(self, rows: Iterable[Sequence[int]], unk_id: int) -> None:
        """Count the ids of some lines."""
        for row in rows:
            self.tokens += len(row)
            self.unknown += row.count(unk_id)

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.unknown / max(self.tokens, 1)


def log_unknown(counts: UnknownTokens, tokenizer: TextTokenizer) -> None:
    """Say how much of an input is <unk>, and the likely cause if it is much."""
    if counts.unknown:
        cause = f": {likely_cause(tokenizer)}" if counts.share > MANY else ""
        shares = (counts.unknown, counts.tokens, 100 * counts.share)
        logger.log(
            logging.WARNING if cause else logging.INFO, "%d of %d tokens of the input (%.2f %%) are <unk>%s", *shares, cause
        )


def likely_cause(tokenizer: TextTokenizer) -> str:
    """Why a text may be unknown to a tokenizer, and what to do."""
    if not isinstance(tokenizer, DictionaryTokenizer):
        return (
            "it has characters that the tokenizer was not trained on: another language or script, or a "
            "data.tokenizer.character_coverage that left them out"
        )
    if tokenizer.splits_words:
        return "the SentencePiece model does not belong to the dictionary, or the text is of another language or script"
    symbols = tokenizer.tokens(range(4, tokenizer.vocab_size))
    if any(symbol.startswith(WORD_START) for symbol in symbols):
        return (
            "the dictionary holds SentencePiece pieces, but text is split at spaces alone: name the SentencePiece model "
            "(data.tokenizer.source_model and target_model; in import fairseq --sentencepiece)"
        )
    if any(symbol.endswith("@@") for symbol in symbols):
        return "the dictionary holds subword-nmt's pieces (@@): split the text by `subword-nmt apply-bpe` first"
    return "text is split at spaces alone: tokenize it as the text of the dictionary was"


def unreachable_tags(tokenizer: TextTokenizer) -> list[str]:
    """Language tags of a dictionary that its SentencePiece model splits, so that no text gives them."""
    if not isinstance(tokenizer, DictionaryTokenizer) or not tokenizer.splits_words:
        return []
    if tokenizer.markers != Markers():  # then they are not of the text; the tokenizer puts them around it
        return []
    symbols = tokenizer.tokens(range(tokenizer.vocab_size))
    tags = [number for number, symbol in enumerate(symbols) if TAG.fullmatch(symbol)]
    rows = tokenizer.encode([f"{symbols[number]} a" for number in tags])
    return [symbols[number] for number, row in zip(tags, rows, strict=True) if number not in row]
