"""Raw blocks to ids, in a worker process. Decode, parse, tokenize, add EOS, filter; numpy arrays come out. A corpus of ids
is checked instead.

If the filter truncates, a longer source is first cut before its EOS, in every split; its text stays whole. An evaluation split
keeps every pair and its texts. A training pair is dropped for the first reason that applies: a side is empty, a side is too long,
one side is too many times longer than the other. Text without a source is judged only by its own length, and
its blank lines are dropped everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dstrain.data.config import DataConfig, PlainText, TextSource, is_text_only, tells_documents
from dstrain.data.directions import direction_ids
from dstrain.data.filtering import FilterConfig
from dstrain.data.prepared.rows import Rows, id_dtype
from dstrain.data.sources.corpora import PairBlock, counted_files, parse, parse_references, splits_of
from dstrain.data.sources.fairseq_binary import IdBlock, Sentences
from dstrain.data.tokenizers.tokenizer import TokenizerPair, load_tokenizers
from dstrain.errors import DataError

if TYPE_CHECKING:
    from dstrain.protocols import TextTokenizer

LOST_WORD = "\u2047"

Mask = npt.NDArray[np.bool_]
LengthColumn = npt.NDArray[np.int32]


class EncodedBlock(NamedTuple):
    """The pairs of a block that are kept, and how many were dropped by reason. corpus: which of the split's they belong to.

    truncated: sources that were cut.
    document_starts: the rows of training text before which a document begins, perhaps the next block's first; none if no corpus
    tells documents.
    """

    corpus: int
    pairs_read: int
    truncated: int
    dropped: dict[str, int]
    rows: Rows
    document_starts: npt.NDArray[np.int64]


def make_encoder(config: DataConfig, tokenizer: Path) -> Encoder:
    """An encoder with the tokenizers of a directory."""
    return Encoder(config, load_tokenizers(tokenizer))


class Encoder:
    """Applies to blocks; depends only on the block, so any process may do it."""

    def __init__(self, config: DataConfig, tokenizers: TokenizerPair) -> None:
        self._filter = config.filter
        self._corpora = splits_of(config)
        self._tells_documents = tells_documents(config.train)
        self._tokenizers = tokenizers
        self._tags = {name: direction_ids(name, own, tokenizers).source_tags for name, own in config.directions.items()}

    def __call__(self, block: PairBlock) -> EncodedBlock:
        """Encode a block. Raises DataError if a record is malformed."""
        corpus = self._corpora[block.split][block.corpus]
        evaluated = block.split != "train"
        if isinstance(block.text, IdBlock):
            rows = self._take_ids(corpus, block.text, with_text=evaluated)
        else:
            rows = self._encode_text(*parse(corpus, block.text))
        if corpus.name in self._tags:
            rows = _tagged(rows, self._tags[corpus.name])
        tells = self._tells_documents and not evaluated
        begins = document_starts(corpus, rows.target_text, len(rows.target_lengths)) if tells else np.empty(0, np.int64)
        has_no_source, truncated = is_text_only(corpus), 0
        if self._filter.long_sources == "truncate" and not has_no_source:
            rows, truncated = _cut_sources(rows, self._filter.max_source_length)
        reasons = drop_reasons(None if has_no_source else rows.source_lengths, rows.target_lengths, self._filter)
        if evaluated:
            reasons = {"empty": reasons["empty"]} if has_no_source else {}
            rows = rows._replace(references=parse_references(corpus, block.text))
        else:
            rows = rows._replace(source_text=None, target_text=None)
        dropped = {reason: int(mask.sum()) for reason, mask in reasons.items()}
        keep = ~np.logical_or.reduce([np.zeros_like(rows.target_lengths, np.bool_), *reasons.values()])
        if any(dropped.values()):
            rows = _kept(rows, keep)
        kept_before = np.concatenate(([0], np.cumsum(keep)))
        return EncodedBlock(block.corpus, block.text.num_lines, truncated, dropped, rows, kept_before[begins])

    def _encode_text(self, source_text: list[str], target_text: list[str]) -> Rows:
        source, target = self._tokenizers.source.encode(source_text), self._tokenizers.target.encode(target_text)
        return Rows(
            *_flatten(source, self._tokenizers.source),
            *_flatten(target, self._tokenizers.target),
            source_text=source_text,
            target_text=target_text,
        )

    def _take_ids(self, corpus: TextSource, block: IdBlock, *, with_text: bool) -> Rows:
        """Ids that are there already, checked against the dictionaries; the text of an evaluation split is made from them."""
        tokenizers, files = self._tokenizers, counted_files(corpus)
        sentences = _empty_sentences(block.num_lines, tokenizers.source) if block.source is None else block.source
        source = checked_ids(sentences, tokenizers.source, files[0], block.first)
        target = checked_ids(block.target, tokenizers.target, files[-1], block.first)
        rows = Rows(source, sentences.lengths, target, block.target.lengths)
        if not with_text:
            return rows
        return rows._replace(
            source_text=_spelled(source, rows.source_lengths, tokenizers.source),
            target_text=_spelled(target, rows.target_lengths, tokenizers.target),
        )


def document_starts(corpus: TextSource, texts: Sequence[str] | None, num_lines: int) -> npt.NDArray[np.int64]:
    """The lines that begin a document, blank ones among them: all if the corpus does not say."""
    if texts is None or not isinstance(corpus, PlainText) or corpus.document_start is None:
        return np.arange(num_lines)
    begins = re.compile(corpus.document_start).match
    return np.array([number for number, text in enumerate(texts) if begins(text)], np.int64)


def drop_reasons(source: LengthColumn | None, target: LengthColumn, limits: FilterConfig) -> dict[str, Mask]:
    """Which pairs to drop, by reason; no pair has two. source, target: lengths with EOS; None for text without a source."""
    empty, too_long = target <= 1, target > limits.max_target_length
    ratio = np.zeros_like(empty)
    if source is not None:
        empty |= source <= 1
        too_long |= source > limits.max_source_length
        if limits.max_ratio is not None:
            ratio = np.maximum(source, target) > limits.max_ratio * np.minimum(source, target)
    return {"empty": empty, "too long": too_long & ~empty, "ratio": ratio & ~empty & ~too_long}


def _empty_sentences(count: int, tokenizer: TextTokenizer) -> Sentences:
    return Sentences(np.full(count, tokenizer.eos_id), np.ones(count, np.int32))


def checked_ids(side: Sentences, tokenizer: TextTokenizer, index: Path, first: int) -> npt.NDArray[Any]:
    """Ids of one side as shards hold them; specials inside a sentence are <unk>, as in text.

    index: the .idx file, for errors. first: number of the first sentence, from 0. Raises DataError naming the sentence that has
    an id beyond the dictionary or no EOS at its end.
    """
    ids, lengths = side
    ends = np.cumsum(lengths, dtype=np.int64)
    beyond = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
    if len(beyond):
        sentence = first + int(np.searchsorted(ends, beyond[0], "right")) + 1
        raise DataError(
            f"{index}: sentence {sentence:,} holds id {int(ids[beyond[0]])}, the dictionary has {tokenizer.vocab_size} "
            "entries with the four specials; give the dictionary that the text was binarized with"
        )
    last = np.zeros(len(ids), np.bool_)
    last[ends[lengths > 0] - 1] = True
    wrong = np.flatnonzero((lengths == 0) | (ids[ends - 1] != tokenizer.eos_id)) if len(ids) else np.flatnonzero(lengths == 0)
    if len(wrong):
        raise DataError(
            f"{index}: sentence {first + int(wrong[0]) + 1:,} does not end in </s> (id {tokenizer.eos_id}); binarize the text "
            "with fairseq-preprocess, which adds it"
        )
    named = (ids == tokenizer.bos_id) | (ids == tokenizer.pad_id) | (ids == tokenizer.eos_id)
    return np.where(named & ~last, tokenizer.unk_id, ids).astype(id_dtype(tokenizer.vocab_size))


def _spelled(ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32], tokenizer: TextTokenizer) -> list[str]:
    """The text of each sentence. Words unknown to the dictionary are U+2047, which no hypothesis contains."""
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    unknown = tokenizer.tokens([tokenizer.unk_id])[0]
    return [text.replace(unknown, LOST_WORD) for text in tokenizer.decode([row[:-1].tolist() for row in rows])]


def _tagged(rows: Rows, tags: Sequence[int]) -> Rows:
    """With tags in front of every source that is not empty."""
    if not tags:
        return rows
    starts = np.cumsum(rows.source_lengths, dtype=np.int64) - rows.source_lengths
    filled = rows.source_lengths > 1
    source = np.insert(rows.source, np.repeat(starts[filled], len(tags)), np.tile(tags, filled.sum()))
    return rows._replace(source=source, source_lengths=rows.source_lengths + len(tags) * filled.astype(np.int32))


def _cut_sources(rows: Rows, limit: int) -> tuple[Rows, int]:
    """Sources of at most `limit` tokens, EOS included, and how many were cut."""
    lengths = rows.source_lengths
    ends = np.repeat(np.cumsum(lengths, dtype=np.int64), lengths)
    left = ends - np.arange(len(rows.source))  # tokens of the row from here on, this one included
    keep = (np.repeat(lengths, lengths) - left < limit - 1) | (left == 1)
    return rows._replace(source=rows.source[keep], source_lengths=np.minimum(lengths, limit)), int((lengths > limit).sum())


def _kept(rows: Rows, keep: Mask) -> Rows:
    """The pairs that `keep` (N,) chooses."""
    return Rows(
        rows.source[np.repeat(keep, rows.source_lengths)],
        rows.source_lengths[keep],
        rows.target[np.repeat(keep, rows.target_lengths)],
        rows.target_lengths[keep],
        source_text=None if rows.source_text is None else list(compress(rows.source_text, keep)),
        target_text=None if rows.target_text is None else list(compress(rows.target_text, keep)),
        references=None if rows.references is None else list(compress(rows.references, keep)),
    )


def _lengths(rows: list[list[int]]) -> LengthColumn:
    return np.fromiter(map(len, rows), np.int32, len(rows)) + 1


def _flatten(rows: list[list[int]], tokenizer: TextTokenizer) -> tuple[npt.NDArray[Any], LengthColumn]:
    """Ids of all rows with EOS after each, and the rows' lengths."""
    lengths = _lengths(rows)
    for row in rows:
        row.append(tokenizer.eos_id)
    values = np.fromiter(chain.from_iterable(rows), id_dtype(tokenizer.vocab_size), int(lengths.sum(dtype=np.int64)))
    return values, lengths
