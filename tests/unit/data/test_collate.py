import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.batch import IGNORE_INDEX, Batch
from dstrain.data.batching.collate import NO_EXAMPLE, Ids, collate

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SENTENCE = st.lists(st.integers(4, 60_000), max_size=12).map(lambda ids: [*ids, EOS])


def batch_of(pairs: list[tuple[list[int], list[int]]], dtype: type[np.integer] = np.uint16) -> Batch:
    examples: list[tuple[Ids, Ids]] = [(np.array(source, dtype), np.array(target, dtype)) for source, target in pairs]
    return collate(examples, np.arange(len(pairs)) + 100, pad_id=PAD, eos_id=EOS)


def test_a_batch_written_out() -> None:
    batch = batch_of([([5, 6, EOS], [7, EOS]), ([5, EOS], [7, 8, 9, EOS]), ([EOS], [EOS])])
    x = IGNORE_INDEX
    assert batch.source is not None
    assert batch.source.tokens.tolist() == [[5, 6, EOS], [5, EOS, PAD], [EOS, PAD, PAD]]
    assert batch.source.lengths.tolist() == [3, 2, 1]
    assert batch.target.tokens.tolist() == [[EOS, 7, PAD, PAD], [EOS, 7, 8, 9], [EOS, PAD, PAD, PAD]]
    assert batch.target.lengths.tolist() == [2, 4, 1]
    assert batch.labels.tolist() == [[7, EOS, x, x], [7, 8, 9, EOS], [EOS, x, x, x]]
    assert batch.num_targets == 7
    assert batch.example_ids.tolist() == [100, 101, 102]
    assert batch.source.positions is batch.source.segments is batch.target.positions is batch.target.segments is None


def test_the_empty_micro_batch_scores_nothing() -> None:
    batch = collate([], np.zeros(0, np.int64), pad_id=PAD, eos_id=EOS)
    assert batch.source is not None
    assert batch.source.tokens.tolist() == batch.target.tokens.tolist() == [[EOS]]
    assert batch.source.lengths.tolist() == batch.target.lengths.tolist() == [1]
    assert batch.labels.tolist() == [[IGNORE_INDEX]]
    assert batch.num_targets == 0
    assert batch.example_ids.tolist() == [NO_EXAMPLE]


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=20), dtype=st.sampled_from([np.uint16, np.int32]))
def test_every_row_is_its_example(pairs: list[tuple[list[int], list[int]]], dtype: type[np.integer]) -> None:
    batch = batch_of(pairs, dtype)
    assert batch.source is not None
    for tensor in (batch.source.tokens, batch.source.lengths, batch.target.tokens, batch.target.lengths, batch.labels):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    assert batch.num_targets == int((batch.labels != IGNORE_INDEX).sum()) == sum(len(target) for _, target in pairs)
    for row, (source, target) in enumerate(pairs):
        s, t = len(source), len(target)
        assert batch.source.tokens[row, :s].tolist() == source
        assert batch.labels[row, :t].tolist() == target
        assert batch.target.tokens[row, :t].tolist() == [EOS, *target[:-1]]
        assert batch.source.tokens[row, s:].eq(PAD).all()
        assert batch.target.tokens[row, t:].eq(PAD).all()
        assert batch.labels[row, t:].eq(IGNORE_INDEX).all()
    assert batch.source.tokens.shape[1] == max(len(source) for source, _ in pairs)
    assert batch.labels.shape[1] == batch.target.tokens.shape[1] == max(len(target) for _, target in pairs)


@pytest.mark.parametrize("pad", [1, 0, 7])
def test_pad_is_the_tokenizers(pad: int) -> None:
    batch = collate(
        [(np.array([5, EOS]), np.array([EOS])), (np.array([EOS]), np.array([5, EOS]))], np.arange(2), pad_id=pad, eos_id=EOS
    )
    assert batch.source is not None
    assert batch.source.tokens[1, 1] == batch.target.tokens[0, 1] == pad


def test_a_batch_does_not_share_memory_with_its_examples() -> None:
    """The data set hands out views of a mapped file, and the plan a view of its window."""
    source, target, rows = np.array([5, EOS]), np.array([6, EOS]), np.array([9])
    batch = collate([(source, target)], rows, pad_id=PAD, eos_id=EOS)
    source[0] = target[0] = rows[0] = 0
    assert batch.source is not None
    assert (batch.source.tokens[0, 0], batch.labels[0, 0], batch.example_ids[0]) == (5, 6, 9)


def test_264_pairs_take_less_than_two_milliseconds() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(8, 24, (264, 2))
    examples = [
        (random.integers(4, 8000, s).astype(np.uint16), random.integers(4, 8000, t).astype(np.uint16)) for s, t in lengths
    ]
    rows = np.arange(264)
    times = []
    for _ in range(30):
        began = time.perf_counter()
        collate(examples, rows, pad_id=PAD, eos_id=EOS)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.002
