"""Text for language models in blocks: the examples of an epoch are blocks of whole or cut documents instead of lines.

A window of documents in random order (`order.py`) is one stream of lines. It is cut into units, which are put into blocks:

documents           units                                  blocks
cut                 block_size tokens of the stream        a unit each
complete_sentences  lines, cut if longer than a block      the next unit begins a block if it does not fit
complete_documents  the same                               as well, and where its document begins
best_fit            documents, cut if longer than a block  best-fit decreasing

Best fit is Ding et al. 2024, "Fewer Truncations Improve Language Modeling": what is left of a cut document is packed like a short
one. Blocks of 512 tokens of WikiText are 99.9 % (cut) and 99.5 % (best_fit) full; those of whole lines 78 and 77 %.

Choice: blocks are a function of (seed, epoch, window) and the lengths of lines; any window is had without those before it, so
resuming needs no state and the number of ranks plays no part. The number of a block in an epoch is that of its window and its own
there. Cost: the memory of one window, and 1 to 2 s per million lines of 127 tokens. Nothing here reads a text but
`BlockExamples.read`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dstrain.data.batching.collate import TokenBlock
from dstrain.data.batching.config import PackingConfig
from dstrain.data.batching.order import Order
from dstrain.data.batching.permutation import IntArray, Permutation
from dstrain.data.lengths import ExampleLengths, Lengths, Longest, Side, StoredLengths
from dstrain.data.prepared.corpora import NamedCorpora
from dstrain.data.prepared.dataset import Dataset
from dstrain.data.ragged import BoolArray, positions_of, segments, starts_of
from dstrain.seeding import derive_seed

_INDEX_BITS = 32
"""Of a block's number, for its place in its window."""
_INDEX_MASK = (1 << _INDEX_BITS) - 1


class Documents:
    """The rows of every document of a split. starts: (d,) the first row of each, ascending from 0; None if each row is one."""

    def __init__(self, starts: IntArray | None, num_rows: int) -> None:
        self._starts = starts
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows if self._starts is None else len(self._starts)

    def first(self, numbers: IntArray) -> IntArray:
        """The first row of each. (n,) -> (n,)"""
        return numbers if self._starts is None else self._starts[numbers]

    def rows(self, numbers: IntArray) -> tuple[IntArray, IntArray]:
        """The rows of some documents one after another, and how many each has (n,)."""
        if self._starts is None:
            return numbers, np.ones(len(numbers), np.int64)
        first, is_last = self._starts[numbers], numbers == len(self) - 1
        ends = np.where(is_last, self._num_rows, self._starts[np.where(is_last, 0, numbers + 1)])
        counts = ends - first
        return np.repeat(first, counts) + positions_of(counts), counts

    def ranges(self, rows: Sequence[range]) -> list[range]:
        """The numbers of the documents that begin in ranges of rows; without ranges in which none does."""
        if self._starts is None:
            return list(rows)
        bounds = self._starts.searchsorted([(part.start, part.stop) for part in rows])
        return [range(first, end) for first, end in bounds.tolist() if first < end]


class Stream(NamedTuple):
    """Lines of documents one after another. rows, lengths: (r,) of each line; counts: (d,) lines of each document."""

    rows: IntArray
    lengths: IntArray
    counts: IntArray


class Pieces(NamedTuple):
    """The lines of blocks, whole or in part, block by block.

    rows: (p,) line of the data set. starts: (p,) its first token in that line. lengths: (p,) tokens. documents: (p,) number of
    its document in the stream. blocks: (p,) the block, ascending from 0. num_long: lines or documents longer than a block.
    """

    rows: IntArray
    starts: IntArray
    lengths: IntArray
    documents: IntArray
    blocks: IntArray
    num_long: int

    @property
    def num_blocks(self) -> int:
        """How many there are."""
        return int(self.blocks[-1]) + 1

    @classmethod
    def concatenated(cls, parts: Sequence[Pieces]) -> Pieces:
        """The blocks of several streams."""
        before = np.cumsum([0, *(part.num_blocks for part in parts)])
        return cls(
            rows=np.concatenate([part.rows for part in parts]),
            starts=np.concatenate([part.starts for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            documents=np.concatenate([part.documents for part in parts]),
            blocks=np.concatenate([part.blocks + start for part, start in zip(parts, before, strict=False)]),
            num_long=sum(part.num_long for part in parts),
        )


def pack_stream(stream: Stream, config: PackingConfig) -> Pieces:
    """Cut a stream into units and put them into blocks, as the head of this file says."""
    size, of_document = config.block_size, segments(stream.counts)
    documents = np.bincount(of_document, stream.lengths, minlength=len(stream.counts)).astype(np.int64)
    match config.documents:
        case "cut":
            parents, units = documents, _cut(stream.lengths.sum(keepdims=True), size)
            of_unit = np.arange(len(units))
        case "best_fit":
            parents, units = documents, _cut(documents, size)
            of_unit = best_fit_decreasing(units, size)
        case _:
            parents, units = stream.lengths, _cut(stream.lengths, size)
            begins = np.zeros(len(units), np.bool_)
            if config.documents == "complete_documents":
                begins[np.cumsum(units).searchsorted(starts_of(documents), "right")] = True
            of_unit = next_fit(units, size, begins)
    line_ends, unit_ends = np.cumsum(stream.lengths), np.cumsum(units)
    ends = np.union1d(line_ends, unit_ends)  # a piece ends wherever a line or a unit does
    lengths = np.diff(ends, prepend=0)
    starts = ends - lengths
    line, blocks = line_ends.searchsorted(starts, "right"), of_unit[unit_ends.searchsorted(starts, "right")]
    order = np.argsort(blocks, kind="stable")
    return Pieces(
        rows=stream.rows[line][order],
        starts=(starts - starts_of(stream.lengths)[line])[order],
        lengths=lengths[order],
        documents=of_document[line][order],
        blocks=blocks[order],
        num_long=int((parents > size).sum()),
    )


def _cut(lengths: IntArray, size: int) -> IntArray:
    """Lengths of the parts of things that are cut every `size` tokens from their beginnings; the last part is the rest."""
    counts = -(-lengths // size)
    parts = np.full(counts.sum(), size, np.int64)
    parts[np.cumsum(counts) - 1] = lengths - (counts - 1) * size
    return parts


def next_fit(lengths: IntArray, size: int, begins: BoolArray) -> IntArray:
    """The block of each unit: the last one if it fits there and `begins` (n,) does not ask for a new one. (n,) -> (n,)"""
    blocks, block, left = [], -1, 0
    for length, begin in zip(lengths.tolist(), begins.tolist(), strict=True):
        if begin or length > left:
            block, left = block + 1, size
        left -= length
        blocks.append(block)
    return np.array(blocks, np.int64)


def best_fit_decreasing(lengths: IntArray, size: int) -> IntArray:
    """The block of each unit, taken from the longest on: the fullest one that it fits into, or a new one. (n,) -> (n,)

    Blocks wait in a stack for each number of tokens that they lack; bit n of `lacking` says whether stack n has any.
    """
    blocks = np.empty(len(lengths), np.int64)
    stacks: list[list[int]] = [[] for _ in range(size + 1)]
    lacking, count = 0, 0
    order = np.argsort(-lengths, kind="stable")
    for unit, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = lacking >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            block = stacks[left].pop()
            if not stacks[left]:
                lacking ^= 1 << left
        else:
            left, block, count = size, count, count + 1
        blocks[unit] = block
        stacks[left - length].append(block)
        lacking |= 1 << (left - length)
    return blocks


class BlockWindows:
    """The blocks of any window. order: of the documents. corpora: of the rows, None if one is all there is."""

    def __init__(
        self,
        lengths: StoredLengths,
        documents: Documents,
        order: Order,
        config: PackingConfig,
        *,
        corpora: NamedCorpora | None = None,
    ) -> None:
        self.config = config
        self.order = order
        self.num_rows = len(lengths)
        self.num_targets = lengths.num_targets(1)
        self._lengths = lengths
        self._documents = documents
        self._corpora = corpora
        self._last: tuple[tuple[int, int], Pieces] | None = None

    def pieces(self, epoch: int, window: int) -> Pieces:
        """Of one window; the last one is kept."""
        last = self._last
        if last is None or last[0] != (epoch, window):
            last = (epoch, window), self._pack(self.order.window(epoch, window))
            self._last = last
        return last[1]

    def _pack(self, numbers: IntArray) -> Pieces:
        """The blocks of some documents, corpus by corpus."""
        parts = [numbers]
        if self._corpora is not None:
            corpora = self._corpora.of(self._documents.first(numbers))
            parts = [numbers[corpora == corpus] for corpus in np.unique(corpora)]
        return Pieces.concatenated([pack_stream(self._stream(part), self.config) for part in parts])

    def _stream(self, numbers: IntArray) -> Stream:
        rows, counts = self._documents.rows(numbers)
        return Stream(rows, self._lengths.target[rows].astype(np.int64), counts)


class BlockLengths:
    """Implements `ExampleLengths`. Blocks have no source: the lone EOS there is part of no sequence."""

    def __init__(self, windows: BlockWindows) -> None:
        self._windows = windows

    def __len__(self) -> int:
        """Rows that the blocks are made of."""
        return self._windows.num_rows

    def of(self, epoch: int, rows: IntArray) -> tuple[Lengths, Lengths]:
        """rows: numbers of blocks."""
        targets = np.empty(len(rows), np.int64)
        windows = rows >> _INDEX_BITS
        for window in np.unique(windows).tolist():
            pieces = self._windows.pieces(epoch, window)
            chosen = windows == window
            sizes = np.bincount(pieces.blocks, pieces.lengths).astype(np.int64)
            targets[chosen] = sizes[rows[chosen] & _INDEX_MASK]
        return np.ones_like(targets), targets

    def longest(self, side: Side) -> Longest:
        """The most that a block may hold."""
        return Longest(0, 1 if side == "source" else self._windows.config.block_size)

    def num_targets(self, epoch: int) -> int:
        """Of all rows: each is in an epoch once, unless corpora are sampled."""
        return self._windows.num_targets


class BlockOrder:
    """Implements `Order`: the blocks of the windows of an order of documents, in random order. seed: of the run."""

    def __init__(self, windows: BlockWindows, seed: int) -> None:
        self._windows = windows
        self._seed = seed
        self.num_windows = windows.order.num_windows

    def window(self, epoch: int, number: int) -> IntArray:
        """Numbers of blocks."""
        size = self._windows.pieces(epoch, number).num_blocks
        return (number << _INDEX_BITS) + Permutation(size, derive_seed(self._seed, "blocks", epoch, number)).elements(0, size)

    def key(self, number: int) -> int:
        """The number."""
        return number

    def num_targets(self, lengths: ExampleLengths) -> int:
        """By the first window, as all have equally many documents."""
        return int(lengths.of(1, self.window(1, 0))[1].sum()) * self.num_windows


class BlockExamples:
    """Implements `Examples`: the blocks of an epoch. start_id: before a line, if its corpus names no other."""

    def __init__(self, dataset: Dataset, windows: BlockWindows, *, start_id: int) -> None:
        self.lengths = BlockLengths(windows)
        self._dataset = dataset
        self._windows = windows
        self._start_id = start_id

    def read(self, epoch: int, rows: IntArray) -> list[TokenBlock]:
        """rows: numbers of blocks."""
        return [self._block(self._windows.pieces(epoch, row >> _INDEX_BITS), row & _INDEX_MASK) for row in rows.tolist()]

    def describe(self) -> str:
        """The blocks of the first window of an epoch, in words."""
        pieces, config = self._windows.pieces(1, 0), self._windows.config
        tokens, number = int(pieces.lengths.sum()), self._windows.order.num_windows
        words = f"{pieces.num_blocks:,} of up to {config.block_size:,} tokens ({config.documents}), "
        words += f"{100 * tokens / (pieces.num_blocks * config.block_size):.1f} % full"
        unit = "lines" if config.documents.startswith("complete") else "documents"
        words += f"; {pieces.num_long:,} {unit} are longer and cut" if pieces.num_long else ""
        return words if number == 1 else f"{words}; in the first of {number:,} parts of an epoch"

    def _block(self, pieces: Pieces, number: int) -> TokenBlock:
        own = slice(*pieces.blocks.searchsorted([number, number + 1]))
        inputs, labels = [], []
        for row, start, length in zip(*(column[own].tolist() for column in pieces[:3]), strict=True):
            _, target, start_id = self._dataset[row]
            line = np.concatenate(([self._start_id if start_id is None else start_id], target))  # inputs, and labels one behind
            inputs.append(line[start : start + length])
            labels.append(line[start + 1 : start + 1 + length])
        total, documents = int(pieces.lengths[own].sum()), pieces.documents[own]
        sequences = np.array([total])
        if self._windows.config.attention == "document":
            bounds = np.flatnonzero(np.diff(documents, prepend=-1))  # documents in a block are neighbors
            sequences = np.add.reduceat(pieces.lengths[own], bounds)
        return TokenBlock(int(pieces.rows[own][0]), np.concatenate(inputs), np.concatenate(labels), sequences)
