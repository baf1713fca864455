"""Raw blocks to ids: what a worker process does. Decode, parse, tokenize, add EOS, filter; numpy arrays come out.

An evaluation split keeps every pair and its texts. A training pair is dropped for the first reason that applies: a side is empty,
a side is too long, one side is too many times longer than the other. Text without a source is judged by its own length alone, and
its blank lines are dropped everywhere.
"""

from __future__ import annotations

from itertools import chain, compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dstrain.data.config import DataConfig, FilterConfig, PlainText
from dstrain.data.corpora import Block, parse, splits_of
from dstrain.data.rows import Rows, id_dtype
from dstrain.data.tokenizer import TokenizerPair, load_tokenizers

if TYPE_CHECKING:
    from dstrain.protocols import TextTokenizer

Mask = npt.NDArray[np.bool_]
Lengths = npt.NDArray[np.int32]


class EncodedBlock(NamedTuple):
    """The pairs of a block that are kept, and how many were dropped by reason."""

    pairs_read: int
    dropped: dict[str, int]
    rows: Rows


def make_encoder(config: DataConfig, tokenizer: Path) -> Encoder:
    """An encoder with the tokenizers of a directory."""
    return Encoder(config, load_tokenizers(tokenizer))


class Encoder:
    """Applies to blocks; depends on the block alone, so any process may do it."""

    def __init__(self, config: DataConfig, tokenizers: TokenizerPair) -> None:
        self._filter = config.filter
        self._corpora = splits_of(config)
        self._tokenizers = tokenizers

    def __call__(self, block: Block) -> EncodedBlock:
        """Encode a block. Raises DataError where a record is malformed."""
        corpus = self._corpora[block.split][block.corpus]
        source_text, target_text = parse(corpus, block.text)
        source, target = self._tokenizers.source.encode(source_text), self._tokenizers.target.encode(target_text)
        alone = isinstance(corpus, PlainText)
        reasons = drop_reasons(None if alone else _lengths(source), _lengths(target), self._filter)
        if block.split != "train":
            reasons = {"empty": reasons["empty"]} if alone else {}
        dropped = {reason: int(mask.sum()) for reason, mask in reasons.items()}
        if any(dropped.values()):
            keep = ~np.logical_or.reduce(list(reasons.values()))
            source, target = list(compress(source, keep)), list(compress(target, keep))
            source_text, target_text = list(compress(source_text, keep)), list(compress(target_text, keep))
        rows = Rows(*_flatten(source, self._tokenizers.source), *_flatten(target, self._tokenizers.target))
        if block.split != "train":
            rows = rows._replace(source_text=source_text, target_text=target_text)
        return EncodedBlock(block.text.num_lines, dropped, rows)


def drop_reasons(source: Lengths | None, target: Lengths, limits: FilterConfig) -> dict[str, Mask]:
    """Which pairs to drop, by reason; no pair has two. source, target: lengths with EOS; None for text without a source."""
    empty, too_long = target <= 1, target > limits.max_target_length
    ratio = np.zeros_like(empty)
    if source is not None:
        empty |= source <= 1
        too_long |= source > limits.max_source_length
        if limits.max_ratio is not None:
            ratio = np.maximum(source, target) > limits.max_ratio * np.minimum(source, target)
    return {"empty": empty, "too long": too_long & ~empty, "ratio": ratio & ~empty & ~too_long}


def _lengths(rows: list[list[int]]) -> Lengths:
    return np.fromiter(map(len, rows), np.int32, len(rows)) + 1


def _flatten(rows: list[list[int]], tokenizer: TextTokenizer) -> tuple[npt.NDArray[Any], Lengths]:
    """Ids of all rows with EOS after each, and the rows' lengths."""
    lengths = _lengths(rows)
    for row in rows:
        row.append(tokenizer.eos_id)
    values = np.fromiter(chain.from_iterable(rows), id_dtype(tokenizer.vocab_size), int(lengths.sum(dtype=np.int64)))
    return values, lengths
