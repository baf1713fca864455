"""The collator: what the models read and what is scored, padded and packed, for both kinds of model."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.batch import Batch, ModelKind, Sequences
from dstrain.data.batching.collate import Collator, PackedSize
from dstrain.data.prepared.dataset import Example
from tests.batches import EOS, PAD, collate

SENTENCE = st.lists(st.integers(4, 60_000), max_size=12).map(lambda ids: [*ids, EOS])
PAIRS = [([5, 6, EOS], [7, EOS]), ([5, EOS], [7, 8, 9, EOS]), ([EOS], [EOS])]
KINDS: list[ModelKind] = ["encoder_decoder", "decoder_only"]


def test_padded_pairs_written_out() -> None:
    batch = collate(PAIRS, ids=[100, 101, 102])
    assert batch.source is not None
    assert batch.source.tokens.tolist() == [[5, 6, EOS], [5, EOS, PAD], [EOS, PAD, PAD]]
    assert batch.source.lengths.tolist() == [3, 2, 1]
    assert batch.target.tokens.tolist() == [[EOS, 7, PAD, PAD], [EOS, 7, 8, 9], [EOS, PAD, PAD, PAD]]
    assert batch.target.lengths.tolist() == [2, 4, 1]
    assert batch.source.packing is batch.target.packing is None
    targets = batch.targets
    assert targets.index.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert targets.labels.tolist() == [7, EOS, 7, 8, 9, EOS, EOS]
    assert targets.weight.tolist() == [0.5] * 2 + [0.25] * 4 + [1.0]
    assert targets.example_id.tolist() == [100] * 2 + [101] * 4 + [102]
    assert targets.position.tolist() == [0, 1, 0, 1, 2, 3, 0]
    assert targets.segment.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert batch.examples.source_start.tolist() == [0, 3, 6]
    assert (batch.num_targets, batch.size) == (7, (7, 3))


def test_padded_concatenated_pairs_written_out() -> None:
    batch = collate(PAIRS, kind="decoder_only")
    assert batch.source is None
    assert batch.target.tokens.tolist() == [
        [5, 6, EOS, 7, PAD],
        [5, EOS, 7, 8, 9],
        [EOS, PAD, PAD, PAD, PAD],
    ], "as wide as the longest joined example, not as the longest source and target together"
    assert batch.target.lengths.tolist() == [4, 5, 1]
    assert batch.targets.index.tolist() == [2, 3, 6, 7, 8, 9, 10]
    assert batch.examples.source_start.tolist() == [0, 5, 10]


def test_another_start_token_stands_before_targets_only() -> None:
    examples = [(np.array(source), np.array(target)) for source, target in PAIRS]
    batch = Collator("encoder_decoder", pad_id=PAD, eos_id=EOS, start_id=4)(examples, np.arange(3))
    assert batch.target.tokens.tolist() == [[4, 7, PAD, PAD], [4, 7, 8, 9], [4, PAD, PAD, PAD]]
    assert batch.targets.labels.tolist() == [7, EOS, 7, 8, 9, EOS, EOS]


def test_an_example_that_names_its_start_token_begins_with_it() -> None:
    """In place of the end of the source, if both sides are one sequence."""
    examples = [
        Example(np.array(source), np.array(target), start) for (source, target), start in zip(PAIRS, (8, None, 9), strict=True)
    ]
    batch = Collator("encoder_decoder", pad_id=PAD, eos_id=EOS, start_id=4)(examples, np.arange(3))
    assert batch.target.tokens.tolist() == [[8, 7, PAD, PAD], [4, 7, 8, 9], [9, PAD, PAD, PAD]]
    assert batch.targets.labels.tolist() == [7, EOS, 7, 8, 9, EOS, EOS]
    packed = Collator("encoder_decoder", pad_id=PAD, eos_id=EOS, packed=PackedSize(8))(examples, np.arange(3))
    assert packed.target.tokens.tolist() == [8, 7, EOS, 7, 8, 9, 9, PAD]
    joined = Collator("decoder_only", pad_id=PAD, eos_id=EOS)(examples, np.arange(3))
    assert joined.target.tokens.tolist() == [[5, 6, 8, 7, PAD], [5, EOS, 7, 8, 9], [9, PAD, PAD, PAD, PAD]]


def test_packed_pairs_written_out() -> None:
    batch = collate(PAIRS, packed=PackedSize(multiple=4))
    assert batch.source is not None and batch.source.packing is not None and batch.target.packing is not None
    assert batch.source.tokens.tolist() == [5, 6, EOS, 5, EOS, EOS, PAD, PAD]
    assert batch.source.lengths.tolist() == [3, 2, 1]
    packing = batch.source.packing
    assert packing.positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert packing.segments.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert packing.starts.tolist() == [0, 3, 5, 6]
    assert packing.token_lengths.tolist() == [3, 3, 3, 2, 2, 1, 1, 1]
    assert (packing.longest, packing.num_tokens) == (3, 6)
    assert batch.target.tokens.tolist() == [EOS, 7, EOS, 7, 8, 9, EOS, PAD]
    assert batch.targets.index.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.examples.source_start.tolist() == [0, 3, 5]
    joined = collate(PAIRS, packed=PackedSize(), kind="decoder_only")
    assert joined.target.tokens.tolist() == [5, 6, EOS, 7, 5, EOS, 7, 8, 9, EOS]
    assert joined.targets.index.tolist() == [2, 3, 5, 6, 7, 8, 9]


def test_the_rows_of_packed_sequences_are_the_padded_ones() -> None:
    packed, padded = collate(PAIRS, packed=PackedSize(multiple=8)), collate(PAIRS)
    for sequences, rows in ((packed.reading, padded.reading), (packed.target, padded.target)):
        assert sequences.packing is not None
        index = sequences.packing.rows
        tokens = sequences.tokens[index.tokens].index_fill(0, index.padding, PAD)
        assert tokens.view(-1, index.width).tolist() == rows.tokens.tolist()
        assert rows.tokens.flatten()[index.cells].tolist() == sequences.tokens[: sequences.packing.num_tokens].tolist()


@pytest.mark.parametrize(("multiple", "expected"), [(1, 7), (7, 7), (4, 8), (64, 64)])
def test_packed_tokens_are_padded_to_a_multiple(multiple: int, expected: int) -> None:
    assert collate(PAIRS, packed=PackedSize(multiple)).target.tokens.shape == (expected,)


@pytest.mark.parametrize("packed", [None, PackedSize(), PackedSize(4)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_micro_batch_scores_nothing(kind: ModelKind, packed: PackedSize | None) -> None:
    batch = collate([], kind=kind, packed=packed)
    assert batch.target.tokens.flatten().tolist() == batch.reading.tokens.flatten().tolist()
    assert batch.target.tokens.flatten().tolist() == [EOS] + ([] if packed is None else [PAD] * (packed.multiple - 1))
    assert batch.target.lengths.tolist() == [1]
    assert (batch.num_targets, batch.size) == (0, (0, 0))
    assert all(len(values) == 0 for part in (batch.targets, batch.examples) for values in vars(part).values())


def real_tokens(sequences: Sequences, number: int) -> list[int]:
    """Those of one example."""
    if sequences.packing is not None:
        return sequences.tokens[sequences.packing.segments == number].tolist()
    return sequences.tokens[number, : sequences.lengths[number]].tolist()


def check(batch: Batch, pairs: list[tuple[list[int], list[int]]]) -> None:
    flat = batch.target.tokens.flatten()
    for number, (source, target) in enumerate(pairs):
        chosen = batch.targets.segment == number
        assert batch.targets.labels[chosen].tolist() == target
        assert flat[batch.targets.index[chosen]].tolist() == [EOS, *target[:-1]]
        start, length = int(batch.examples.source_start[number]), int(batch.examples.source_length[number])
        assert batch.reading.tokens.flatten()[start : start + length].tolist() == source
        joined = [EOS, *target[:-1]] if batch.source is not None else [*source, *target[:-1]]
        assert real_tokens(batch.target, number) == joined
    for sequences in (batch.reading, batch.target):
        if sequences.packing is None:
            real = torch.arange(sequences.tokens.shape[1]) < sequences.lengths[:, None]
        else:
            real = torch.arange(len(sequences.tokens)) < sequences.lengths.sum()
        assert sequences.tokens[~real].eq(PAD).all()
        assert sequences.tokens.dtype == sequences.lengths.dtype == torch.int64
        assert sequences.tokens.is_contiguous()
    assert batch.num_targets == sum(len(target) for _, target in pairs)


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=20),
    kind=st.sampled_from(KINDS),
    packed=st.none() | st.builds(PackedSize, st.integers(1, 300)),
)
def test_every_example_is_where_the_batch_says(
    pairs: list[tuple[list[int], list[int]]], kind: ModelKind, packed: PackedSize | None
) -> None:
    check(collate(pairs, kind=kind, packed=packed), pairs)


def test_a_teacher_of_the_other_kind_has_a_batch_of_its_own() -> None:
    batch = collate(PAIRS, teacher_kinds=["encoder_decoder", "decoder_only"])
    other = batch.for_kind("decoder_only")
    assert batch.for_kind("encoder_decoder") is batch
    assert other.kind == "decoder_only"
    check(other, PAIRS)
    assert torch.equal(other.targets.labels, batch.targets.labels)
    with pytest.raises(ValueError, match="made for encoder_decoder models only; name the kind decoder_only to its Collator"):
        collate(PAIRS).for_kind("decoder_only")


def test_a_batch_does_not_share_memory_with_its_examples() -> None:
    """The data set hands out views of a mapped file, and the plan a view of its window."""
    source, target, ids = np.array([5, EOS]), np.array([6, EOS]), np.array([9])
    batch = Collator("encoder_decoder", pad_id=PAD, eos_id=EOS)([(source, target)], ids)
    source[0] = target[0] = ids[0] = 0
    assert (batch.reading.tokens[0, 0], batch.targets.labels[0], batch.examples.ids[0]) == (5, 6, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_264_pairs_take_less_than_five_plain_fillings_of_a_table(kind: ModelKind) -> None:
    """The table is what no collator can do without: every sentence copied to its row, as int64."""
    random = np.random.default_rng(0)
    lengths = random.integers(8, 24, (264, 2))
    examples = [
        (random.integers(4, 8000, s).astype(np.uint16), random.integers(4, 8000, t).astype(np.uint16)) for s, t in lengths
    ]
    ids, collator = np.arange(264), Collator(kind, pad_id=PAD, eos_id=EOS)

    def table() -> None:
        rows = np.zeros((264, 2, 24), np.int64)
        for row, (source, target) in zip(rows, examples, strict=True):
            row[0, : len(source)] = source
            row[1, : len(target)] = target

    times: dict[str, list[float]] = {"table": [], "collator": []}
    for _ in range(30):
        for name, work in (("table", table), ("collator", lambda: collator(examples, ids))):
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    assert min(times["collator"]) < 5 * min(times["table"])
