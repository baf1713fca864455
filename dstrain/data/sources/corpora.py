"""The corpora of a recipe as numbered pairs, whatever their kind: how many there are, blocks of them, and the pairs of a block.

The pairs of a split are numbered through its corpora in order; shard k holds those of numbers k * pairs_per_shard and up that the
filter keeps. So a shard depends only on its own pairs, and an interrupted run goes on at a shard's first pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

from dstrain.data.config import (
    DataConfig,
    FairseqIds,
    FairseqText,
    GrammarText,
    HuggingFaceDataset,
    JsonlText,
    ParallelText,
    ParquetTable,
    PlainText,
    RecordSource,
    TextSource,
    TsvText,
)
from dstrain.data.sources.fairseq_binary import IdBlock, IdReader, files_of_prefix, scan_binary
from dstrain.data.sources.grammar import GrammarReader
from dstrain.data.sources.records import RecordBlock, record_references, record_texts
from dstrain.data.sources.tables import (
    count_data_set,
    data_set_files,
    read_data_set,
    read_parquet,
    scan_content,
    scan_parquet,
)
from dstrain.data.sources.text import (
    BlockReader,
    FileScan,
    TextBlock,
    decode_lines,
    expand_path,
    scan_file,
    scan_jsonl,
    scan_tsv,
)
from dstrain.errors import DataError


class PairBlock(NamedTuple):
    """Consecutive pairs of one split, still raw. corpus: which of the split's corpora they belong to."""

    split: str
    corpus: int
    text: TextBlock | RecordBlock | IdBlock


class Reader(Protocol):
    """Hands out the next pairs of one corpus."""

    def read(self, max_lines: int) -> TextBlock | RecordBlock | IdBlock:
        """At least one pair, at most `max_lines`."""
        ...


def splits_of(config: DataConfig) -> dict[str, tuple[TextSource, ...]]:
    """Corpora by name of split, `train` first."""
    return {"train": config.train, "valid": config.valid, **config.test}


def files_of(source: TextSource) -> tuple[Path, ...]:
    """The files that a corpus is read from, source side first."""
    match source:
        case ParallelText():
            return expand_path(source.source), expand_path(source.target)
        case TsvText() | JsonlText() | ParquetTable() | PlainText():
            return (expand_path(source.path),)
        case HuggingFaceDataset():
            return data_set_files(source)
        case FairseqIds():
            return (*files_of_prefix(expand_path(source.source)), *files_of_prefix(expand_path(source.target)))
        case FairseqText():
            return files_of_prefix(expand_path(source.path))
        case GrammarText():
            return ()


def counted_files(source: TextSource) -> tuple[Path, ...]:
    """The files of a corpus that have an entry for every pair."""
    if isinstance(source, HuggingFaceDataset):
        return ()
    files = files_of(source)
    return files[::2] if isinstance(source, FairseqIds | FairseqText) else files


def scan_of(source: TextSource) -> Callable[[Path], FileScan]:
    """How a file of this corpus is checked and counted."""
    match source:
        case FairseqIds() | FairseqText():
            return scan_binary
        case TsvText():
            return scan_tsv
        case JsonlText():
            return scan_jsonl
        case ParquetTable():
            return partial(scan_parquet, source=source)
        case HuggingFaceDataset():
            return scan_content
        case _:
            return scan_file


def pairs_without_lines(source: TextSource) -> int:
    """Pairs of a corpus that no file counts line by line."""
    match source:
        case GrammarText():
            return source.num_pairs
        case HuggingFaceDataset():
            return count_data_set(source)
        case _:
            return 0


def read_blocks(
    split: str, sources: Sequence[TextSource], sizes: Sequence[int], start: int, per_shard: int
) -> Iterator[PairBlock]:
    """All blocks of a split from pair `start` on, in order; none crosses a corpus or a shard.

    sizes: pairs of each corpus.
    """
    ends = list(accumulate(sizes))
    for corpus, (source, size, end) in enumerate(zip(sources, sizes, ends, strict=True)):
        if start >= end:
            continue
        begin = end - size
        with _open(source, start - begin) as reader:
            while start < end:
                shard_end = (start // per_shard + 1) * per_shard
                text = reader.read(min(end, shard_end) - start)
                yield PairBlock(split, corpus, text)
                start += text.num_lines


def _open(source: TextSource, start: int) -> AbstractContextManager[Reader]:
    match source:
        case GrammarText():
            return GrammarReader(source.split, source.num_pairs, source.seed, start)
        case FairseqIds():
            return IdReader(expand_path(source.source), expand_path(source.target), start=start)
        case FairseqText():
            return IdReader(None, expand_path(source.path), start=start)
        case ParquetTable():
            return read_parquet(source, start)
        case HuggingFaceDataset():
            return read_data_set(source, start)
        case _:
            return BlockReader(files_of(source), start + header_lines(source))


def header_lines(source: TextSource) -> int:
    """Lines at the beginning of a file that are no pairs."""
    return int(isinstance(source, TsvText) and source.header)


def parse(source: TextSource, block: TextBlock | RecordBlock) -> tuple[list[str], list[str]]:
    """Source and target texts of a block's pairs; sources are empty if the corpus has none.

    Raises DataError naming file and line if a record is malformed.
    """
    if isinstance(source, RecordSource):
        return record_texts(source, block)
    assert isinstance(block, TextBlock), "only records have fields"
    match source:
        case TsvText():
            return _parse_tsv(source, block)
        case PlainText():
            lines = decode_lines(block, 0)
            return [""] * len(lines), lines
        case _:
            return decode_lines(block, 0), decode_lines(block, 1)


def parse_references(source: TextSource, block: TextBlock | RecordBlock | IdBlock) -> list[list[str]] | None:
    """All references of each of a block's pairs; None if the target is the only one.

    Raises DataError naming file and line of a record without one.
    """
    if isinstance(source, RecordSource) and source.references is not None:
        assert not isinstance(block, IdBlock), "only a fairseq corpus has ids"
        return record_references(source, source.references, block)
    return None


def has_references(source: TextSource) -> bool:
    """Whether a corpus has other references than its targets."""
    return isinstance(source, RecordSource) and source.references is not None


def _parse_tsv(source: TsvText, block: TextBlock) -> tuple[list[str], list[str]]:
    rows = [line.split("\t") for line in decode_lines(block, 0)]
    source_column = source.source_column
    needed = source.target_column if source_column is None else max(source_column, source.target_column)
    for number, row in enumerate(rows, block.first + 1):
        if len(row) <= needed:
            raise DataError(
                f"{files_of(source)[0]}:{number}: {len(row)} tab-separated columns, column {needed} (counted from 0) is missing; "
                "fix the line or the columns in the recipe"
            )
    return ["" if source_column is None else row[source_column] for row in rows], [row[source.target_column] for row in rows]
