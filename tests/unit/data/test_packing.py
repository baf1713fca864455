"""Blocks of lines: how the four ways fill them, what a model reads of them, and that only seed, epoch and data decide them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from itertools import chain, islice, pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.batch import Batch
from dstrain.data.batching.collate import Collator, PackedSize, TokenBlock
from dstrain.data.batching.config import PackingConfig
from dstrain.data.batching.loader import TrainLoader
from dstrain.data.batching.order import MixedOrder, Order, ShuffledOrder
from dstrain.data.batching.packing import (
    BlockExamples,
    BlockLengths,
    BlockOrder,
    BlockWindows,
    Documents,
    Pieces,
    Stream,
    best_fit_decreasing,
    pack_stream,
)
from dstrain.data.batching.plan import StepPlan
from dstrain.data.config import BatchingConfig
from dstrain.data.lengths import StoredLengths
from dstrain.data.prepared.corpora import CorpusRanges, NamedCorpora
from dstrain.data.prepared.dataset import Dataset, Example
from dstrain.data.sampling import WeightedSampling
from tests.batches import EOS, PAD

DOCUMENTS = [[3, 2], [4], [9], [1, 1]]
"""Lengths of the lines of four documents, 20 tokens."""
LINES = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=30)
WAYS = ["cut", "complete_sentences", "complete_documents", "best_fit"]


def stream(documents: Sequence[Sequence[int]]) -> Stream:
    lengths = np.array(list(chain.from_iterable(documents)))
    return Stream(np.arange(len(lengths)), lengths, np.array(list(map(len, documents))))


def pack(documents: Sequence[Sequence[int]], way: str, size: int) -> Pieces:
    return pack_stream(stream(documents), PackingConfig.model_validate({"block_size": size, "documents": way}))


def blocks_of(pieces: Pieces) -> list[list[tuple[int, int, int]]]:
    """(line, first token, tokens) of the pieces of each block."""
    listed = list(zip(pieces.rows.tolist(), pieces.starts.tolist(), pieces.lengths.tolist(), strict=True))
    return [[piece for piece, block in zip(listed, pieces.blocks, strict=True) if block == n] for n in range(pieces.num_blocks)]


@pytest.mark.parametrize(
    ("way", "expected", "num_long"),
    [
        # lines 0 1 | 2 | 3 | 4 5 of 3 2 | 4 | 9 | 1 1 tokens
        ("cut", [[(0, 0, 3), (1, 0, 2), (2, 0, 1)], [(2, 1, 3), (3, 0, 3)], [(3, 3, 6)], [(4, 0, 1), (5, 0, 1)]], 1),
        ("complete_sentences", [[(0, 0, 3), (1, 0, 2)], [(2, 0, 4)], [(3, 0, 6)], [(3, 6, 3), (4, 0, 1), (5, 0, 1)]], 1),
        ("complete_documents", [[(0, 0, 3), (1, 0, 2)], [(2, 0, 4)], [(3, 0, 6)], [(3, 6, 3)], [(4, 0, 1), (5, 0, 1)]], 1),
        ("best_fit", [[(3, 0, 6)], [(0, 0, 3), (1, 0, 2)], [(2, 0, 4), (4, 0, 1), (5, 0, 1)], [(3, 6, 3)]], 1),
    ],
)
def test_four_ways_written_out(way: str, expected: list[Any], num_long: int) -> None:
    pieces = pack(DOCUMENTS, way, 6)
    assert blocks_of(pieces) == expected
    assert pieces.num_long == num_long


@settings(max_examples=80, deadline=None)
@given(documents=LINES, size=st.integers(1, 40), way=st.sampled_from(WAYS))
def test_every_token_is_in_one_block(documents: list[list[int]], size: int, way: str) -> None:
    pieces, lines = pack(documents, way, size), list(chain.from_iterable(documents))
    tokens = [(row, start + n) for row, start, length in chain(*blocks_of(pieces)) for n in range(length)]
    assert sorted(tokens) == [(row, n) for row, length in enumerate(lines) for n in range(length)]
    sizes = np.bincount(pieces.blocks, pieces.lengths)
    assert sizes.min() > 0 and sizes.max() <= size
    assert np.array_equal(pieces.documents, np.repeat(np.arange(len(documents)), list(map(len, documents)))[pieces.rows])
    if way == "cut":
        assert tokens == sorted(tokens) and (sizes[:-1] == size).all()
    if way == "complete_documents":
        assert all(len(set(pieces.documents[pieces.blocks == block])) == 1 for block in range(pieces.num_blocks))
    if way.startswith("complete"):
        whole = [row for row, start, length in chain(*blocks_of(pieces)) if start == 0 and length == lines[row]]
        assert whole == [row for row, length in enumerate(lines) if length <= size]
        assert pieces.num_long == len(lines) - len(whole)
        for (one, before), (two, after) in pairwise(enumerate(blocks_of(pieces))):
            same = pieces.documents[pieces.blocks == one][-1] == pieces.documents[pieces.blocks == two][0]
            if way == "complete_sentences" or same:
                assert sum(piece[2] for piece in before) + after[0][2] > size, "the next line would have fit"


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), size=st.integers(20, 30))
def test_best_fit_is_that_of_its_definition(lengths: list[int], size: int) -> None:
    left: list[int] = []
    expected: dict[int, int] = {}
    for unit in sorted(range(len(lengths)), key=lambda unit: -lengths[unit]):
        fitting = [block for block, space in enumerate(left) if space >= lengths[unit]]
        block = min(fitting, key=lambda block: left[block], default=len(left))
        left += [size] * (block == len(left))
        left[block] -= lengths[unit]
        expected[unit] = block
    blocks = best_fit_decreasing(np.array(lengths), size)
    assert sorted(np.bincount(blocks, lengths)) == sorted(size - space for space in left)
    assert len(set(blocks)) == len(left)


def test_cut_and_best_fit_fill_blocks_to_99_percent() -> None:
    """Lines as long as WikiText's, on average 127 tokens, one document each."""
    lengths = (np.random.default_rng(0).gamma(1.0, 126.0, 20_000).astype(np.int64) + 1)[:, None].tolist()
    filled = {}
    for way in ("cut", "best_fit", "complete_sentences"):
        pieces = pack(lengths, way, 512)
        filled[way] = int(pieces.lengths.sum()) / (pieces.num_blocks * 512)
    assert min(filled["cut"], filled["best_fit"]) > 0.99
    assert 0.7 < filled["complete_sentences"] < 0.9


class Text:
    """A data set whose tokens tell line and place: 100 line + place + 10, then EOS. documents: lengths of their lines."""

    def __init__(self, documents: Sequence[Sequence[int]], config: dict[str, Any], *, window: int = 1000, **options: Any) -> None:
        counts = np.array(list(map(len, documents)))
        self.lines = np.array(list(chain.from_iterable(documents)))
        self.documents = Documents(None if (counts == 1).all() else np.cumsum(counts) - counts, len(self.lines))
        order: Order = options.pop("order", None) or ShuffledOrder([range(len(documents))], window, 1)
        lengths = StoredLengths(np.ones_like(self.lines), self.lines)
        self.windows = BlockWindows(lengths, self.documents, order, PackingConfig.model_validate(config), **options)
        self.order = BlockOrder(self.windows, 1)
        self.examples = BlockExamples(cast("Dataset", self), self.windows, start_id=EOS)

    def __getitem__(self, row: int) -> Example:
        return Example(np.array([EOS]), np.array([*(100 * row + 10 + np.arange(self.lines[row] - 1)), EOS]))

    def plan(self, **batching: Any) -> StepPlan:
        config = BatchingConfig(**{"tokens_per_step": 60, "max_tokens": 40, **batching})
        return StepPlan(self.examples.lengths, config, 1, kind="decoder_only", order=self.order)


def read_all(text: Text, epoch: int = 1) -> list[TokenBlock]:
    windows = [text.order.window(epoch, number) for number in range(text.order.num_windows)]
    return [block for window in windows for block in text.examples.read(epoch, window)]


def test_a_block_knows_the_token_before_each_piece_and_the_sequences_of_its_documents() -> None:
    for attention, sequences in (("document", [[5, 1], [3, 2]]), ("block", [[6], [5]])):
        in_order = SimpleNamespace(num_windows=1, window=lambda epoch, number: np.arange(3))
        text = Text([[3, 2], [4], [2]], {"block_size": 6, "attention": attention}, order=in_order)
        first, second = text.examples.read(1, np.array([0, 1]))
        assert first.labels.tolist() == [10, 11, EOS, 110, EOS, 210]
        assert first.inputs.tolist() == [EOS, 10, 11, EOS, 110, EOS]
        assert second.labels.tolist() == [211, 212, EOS, 310, EOS]
        assert second.inputs.tolist() == [210, 211, 212, EOS, 310], "the rest of a cut line is read after its beginning"
        assert [block.sequences.tolist() for block in (first, second)] == sequences
        assert (first.row, second.row) == (0, 2)


@pytest.mark.parametrize("packed", [None, PackedSize(4)])
def test_a_collated_block_is_one_example_of_several_sequences(packed: PackedSize | None) -> None:
    two = TokenBlock(7, np.array([EOS, 5, 6]), np.array([5, 6, EOS]), np.array([2, 1]))
    blocks = [two, TokenBlock(9, np.array([4]), np.array([4]), np.array([1]))]
    batch = Collator("decoder_only", pad_id=PAD, eos_id=EOS, packed=packed)(blocks, np.array([40, 41]))
    assert batch.source is None
    if packed is None:
        assert batch.target.tokens.tolist() == [[EOS, 5], [6, PAD], [4, PAD]]
        assert batch.targets.index.tolist() == [0, 1, 2, 4]
    else:
        assert batch.target.tokens.tolist() == [EOS, 5, 6, 4]
        assert batch.target.packing is not None
        assert batch.target.packing.positions.tolist() == [0, 1, 0, 0]
        assert batch.target.packing.segments.tolist() == [0, 0, 1, 2]
        assert batch.targets.index.tolist() == [0, 1, 2, 3]
    assert batch.targets.labels.tolist() == [5, 6, EOS, 4]
    assert batch.targets.example_id.tolist() == [40, 40, 40, 41]
    assert batch.targets.position.tolist() == [0, 1, 2, 0]
    assert batch.targets.segment.tolist() == [0, 0, 0, 1]
    assert batch.targets.weight.tolist() == pytest.approx([1 / 3] * 3 + [1])
    assert batch.size == (4, 2)
    assert batch.examples.ids.tolist() == [40, 41]
    assert batch.target.keys is not None
    keys = batch.target.keys.flatten()[batch.targets.index]
    assert len(keys.unique()) == 4, "each token has a dropout mask of its own"


@settings(max_examples=30, deadline=None)
@given(documents=LINES, way=st.sampled_from(WAYS), window=st.integers(1, 40), size=st.integers(1, 40))
def test_an_epoch_has_every_token_once_and_another_epoch_other_blocks(
    documents: list[list[int]], way: str, window: int, size: int
) -> None:
    text = Text(documents, {"block_size": size, "documents": way}, window=window)
    plan = text.plan()
    for epoch in (1, 2):
        steps = list(plan.epoch(epoch))
        blocks = [block for step in steps for block in text.examples.read(epoch, step.examples)]
        labels = np.concatenate([block.labels for block in blocks])
        assert np.array_equal(np.sort(labels), np.sort(np.concatenate([text[row].target for row in range(len(text.lines))])))
        assert sum(step.num_targets for step in steps) == text.lines.sum()
        sizes = [sum(len(block.labels) for block in text.examples.read(epoch, step.examples)) for step in steps]
        assert sizes == [step.num_targets for step in steps]
        assert len({number for step in steps for number in step.examples.tolist()}) == len(blocks)


def listed(batches: Sequence[Batch]) -> list[tuple[list[int], list[int]]]:
    return [(batch.examples.ids.tolist(), batch.targets.labels.tolist()) for batch in batches]


def test_a_resume_and_more_ranks_see_the_same_blocks() -> None:
    def load(text: Text, start: tuple[int, int] = (1, 0), rank: int = 0, size: int = 1) -> list[Any]:
        collator = Collator("decoder_only", pad_id=PAD, eos_id=EOS, packed=PackedSize())
        with TrainLoader(text.examples, text.plan(), collator, start=start, data_rank=rank, data_size=size) as steps:
            return [(step.epoch, step.index, batches) for step, batches in islice(steps, 25)]

    random = np.random.default_rng(0)
    documents = [random.integers(1, 20, random.integers(1, 5)).tolist() for _ in range(40)]

    def text() -> Text:
        return Text(documents, {"block_size": 20, "documents": "best_fit"}, window=13)

    straight = load(text())
    assert {epoch for epoch, _, _ in straight} == {1, 2}
    for stop in (3, 11, 24):
        epoch, index, _ = straight[stop]
        resumed = load(text(), start=(epoch, index))
        for (*place, batches), (*other, expected) in zip(resumed, straight[stop:], strict=False):
            assert place == other and listed(batches) == listed(expected)
    of_ranks = [load(text(), rank=rank, size=3) for rank in range(3)]
    for number, (*place, batches) in enumerate(straight):
        shares = [steps[number] for steps in of_ranks]
        assert all(list(share[:2]) == place for share in shares)
        assert len({len(share[2]) for share in shares}) == 1
        together = [example for share in shares for ids, _ in listed(share[2]) for example in ids]
        assert sorted(together) == sorted(example for ids, _ in listed(batches) for example in ids)


def test_blocks_differ_by_epoch() -> None:
    text = Text([[5]] * 30, {"block_size": 10})
    assert [b.labels.tolist() for b in read_all(text, 1)] != [b.labels.tolist() for b in read_all(text, 2)]
    assert [b.labels.tolist() for b in read_all(text, 1)] == [b.labels.tolist() for b in read_all(text, 1)]


@pytest.mark.parametrize("way", WAYS)
def test_a_block_holds_one_corpus(way: str) -> None:
    documents = [[3, 2], [4], [2], [3, 3], [5], [1]]
    corpora = NamedCorpora(["a", "b"], CorpusRanges([(0, 4), (1, 4)]))
    text = Text(documents, {"block_size": 7, "documents": way}, corpora=corpora)
    collator = Collator("decoder_only", pad_id=PAD, eos_id=EOS, packed=PackedSize(), corpora=corpora)
    counts = np.zeros(2, np.int64)
    for number in range(text.order.num_windows):
        ids = text.order.window(1, number)
        for block, example in zip(text.examples.read(1, ids), ids, strict=True):
            rows = {(int(label) - 10) // 100 for label in block.labels if label != EOS}
            assert len({row < 4 for row in rows}) <= 1
            batch = collator([block], np.array([example]))
            assert batch.corpora is not None
            counts += batch.corpora.counts
    assert counts.tolist() == [11, 12]


def test_corpora_of_documents_are_sampled() -> None:
    """Two documents of a and six of b, each drawn as often as the other corpus's: 4 of each an epoch."""
    documents = [[2, 2]] * 2 + [[4]] * 6
    corpora = NamedCorpora(["a", "b"], CorpusRanges([(0, 4), (1, 6)]))
    starts = Documents(np.array([0, 2, 4, 5, 6, 7, 8, 9]), 10)
    drawn = {name: starts.ranges(corpora.rows(name)) for name in corpora.names}
    assert drawn == {"a": [range(2)], "b": [range(2, 8)]}
    phases = WeightedSampling(weights={"a": 1, "b": 1}).phases({"a": 2, "b": 6})
    order = MixedOrder(drawn, phases, num_examples=8, capacity=100, seed=1)
    text = Text(documents, {"block_size": 4}, corpora=corpora, order=order)
    rows = [int(block.row) for block in read_all(text)]
    assert sorted(row for row in rows if row < 4) == [0, 0, 2, 2], "each document of a is drawn twice"
    assert len([row for row in rows if row >= 4]) == 4


def test_documents_and_their_rows() -> None:
    documents = Documents(np.array([0, 2, 3]), 6)
    rows, counts = documents.rows(np.array([2, 0, 2]))
    assert (rows.tolist(), counts.tolist()) == ([3, 4, 5, 0, 1, 3, 4, 5], [3, 2, 3])
    assert documents.ranges([range(2), range(2, 2), range(2, 6)]) == [range(1), range(1, 3)]
    assert documents.ranges([range(1), range(1, 2), range(2, 6)]) == [range(1), range(1, 3)], "none begins in row 1"
    assert len(documents) == 3
    lines = Documents(None, 6)
    assert (len(lines), lines.ranges([range(2, 6)])) == (6, [range(2, 6)])
    assert [part.tolist() for part in lines.rows(np.array([4, 1]))] == [[4, 1], [1, 1]]


def test_memory_is_that_of_a_window() -> None:
    def peak(size: int) -> int:
        lengths = np.random.default_rng(0).integers(1, 60, size).astype(np.int32)
        order = ShuffledOrder([range(size)], 20_000, 1)
        config = PackingConfig(block_size=64, documents="best_fit")
        windows = BlockWindows(StoredLengths(np.ones_like(lengths), lengths), Documents(None, size), order, config)
        batching = BatchingConfig(tokens_per_step=4096, max_tokens=4096, shuffle_window=20_000)
        plan = StepPlan(BlockLengths(windows), batching, 1, order=BlockOrder(windows, 1))
        tracemalloc.start()
        steps = list(islice(plan.epoch(1), 60))
        assert sum(step.num_targets for step in steps) > 0.95 * 60 * 4096
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(2_000_000) < 1.2 * peak(200_000)


def test_the_blocks_are_described() -> None:
    text = Text(DOCUMENTS, {"block_size": 6})
    assert text.examples.describe() == "4 of up to 6 tokens (cut), 83.3 % full; 1 documents are longer and cut"
    text = Text(DOCUMENTS, {"block_size": 30, "documents": "complete_sentences"}, window=2)
    assert text.examples.describe().endswith(" % full; in the first of 2 parts of an epoch")
