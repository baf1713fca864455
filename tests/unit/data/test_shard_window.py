"""The order that stays near the shards: every example once, few shards at a time, any window without those before it."""

from collections import Counter
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from dstrain.data.batching.order import CorpusStream, MixedOrder, ShuffledOrder
from dstrain.data.batching.permutation import Permutation
from dstrain.data.batching.plan import StepPlan
from dstrain.data.batching.shard_window import MIN_BLOCK, WindowedPermutation, build_shuffle
from dstrain.data.config import BatchingConfig
from dstrain.data.lengths import StoredLengths
from dstrain.data.prepared.corpora import CorpusRanges, split_at_shards
from dstrain.data.sampling import Phase
from dstrain.data.shuffling import ExampleShuffle, ShardWindowShuffle, ShuffleConfig
from dstrain.seeding import derive_seed

ROWS, SHARDS, WINDOW = 5_000, 40, 4
NEAR = build_shuffle(ShardWindowShuffle(shards=WINDOW))
EQUAL = [range(number * ROWS, (number + 1) * ROWS) for number in range(SHARDS)]


def drawn(order: ShuffledOrder | MixedOrder, epoch: int) -> np.ndarray:
    return np.concatenate([order.window(epoch, number) for number in range(order.num_windows)])


def by_definition(sizes: list[int], shards: int, seed: int) -> list[int]:
    """The order once more, one example at a time."""
    size = sum(sizes)
    block = max(-(-size * shards // (2 * len(sizes))), MIN_BLOCK)
    lines = [list(range(sum(sizes[:number]), sum(sizes[: number + 1]))) for number in range(len(sizes))]
    shard_order = Permutation(len(sizes), derive_seed(seed, "shards")).elements(0, len(sizes))
    by_shard = [line for number in shard_order for line in lines[number]]

    def shuffled(items: list[int], shift: int, purpose: str) -> list[int]:
        bounds = [0, *range(block - shift, size, block), size]
        result = []
        for number, (start, stop) in enumerate(pairwise(bounds)):
            order = Permutation(stop - start, derive_seed(seed, purpose, number)).elements(0, stop - start)
            result += [items[start + index] for index in order.tolist()]
        return result

    return shuffled(shuffled(by_shard, 0, "blocks"), block // 2, "shifted blocks")


@pytest.mark.parametrize(
    ("sizes", "shards"), [([3000] * 9 + [17], 3), ([5000, 1, 0, 12_000, 7, 9000], 2), ([10, 20], 2), ([1], 16)]
)
def test_the_order_is_its_definition(sizes: list[int], shards: int) -> None:
    order = WindowedPermutation(np.array(sizes), shards, seed=5)
    expected = by_definition(sizes, shards, seed=5)
    assert sorted(expected) == list(range(sum(sizes)))
    assert order.elements(0, order.size).tolist() == expected
    for start, stop in ((0, 1), (order.size // 3, order.size // 2), (order.size, order.size)):
        assert order.elements(start, stop).tolist() == expected[start:stop]


def test_every_example_once_an_epoch_in_another_order_each() -> None:
    order = ShuffledOrder(EQUAL, 7_001, seed=1, shuffle=NEAR)
    epochs = [drawn(order, epoch) for epoch in (1, 2)]
    for lines in epochs:
        assert np.array_equal(np.sort(lines), np.arange(SHARDS * ROWS))
    assert not np.array_equal(*epochs)
    again = ShuffledOrder(EQUAL, 7_001, seed=1, shuffle=NEAR)
    assert np.array_equal(again.window(2, 20), order.window(2, 20))


def test_an_example_moves_by_less_than_the_window_and_windows_read_few_shards() -> None:
    permutation = WindowedPermutation(np.full(SHARDS, ROWS), WINDOW, seed=3)
    elements = permutation.elements(0, permutation.size)
    shard_order = Permutation(SHARDS, derive_seed(3, "shards")).elements(0, SHARDS)
    position_of_shard = np.argsort(shard_order)
    base = position_of_shard[elements // ROWS] * ROWS + elements % ROWS
    moves = np.abs(base - np.arange(len(base)))
    assert moves.max() < WINDOW * ROWS
    assert moves.mean() > ROWS  # and really moves: a quarter of the window at least
    order = ShuffledOrder(EQUAL, ROWS, seed=1, shuffle=NEAR)
    working_sets = [len(set((order.window(1, number) // ROWS).tolist())) for number in range(order.num_windows)]
    assert max(working_sets) <= 1 + 1.5 * WINDOW + 2 < SHARDS / 4
    assert sum(working_sets) / len(working_sets) > 2
    everywhere = ShuffledOrder(EQUAL, ROWS, seed=1)
    assert len(set((everywhere.window(1, 0) // ROWS).tolist())) == SHARDS


def test_neighbors_of_the_text_are_parted() -> None:
    """Two lines that follow one another in a shard are nowhere near in the order, in the mean."""
    permutation = WindowedPermutation(np.full(SHARDS, ROWS), WINDOW, seed=3)
    positions = np.argsort(permutation.elements(0, permutation.size))
    apart = np.abs(np.diff(positions))
    assert np.median(apart) > ROWS / 2
    assert np.count_nonzero(apart == 1) < 50  # 2 / 10,000 of 200,000 pairs at random within a block


def test_no_window_but_one_shard_is_a_plain_random_order() -> None:
    lines = WindowedPermutation(np.array([3000]), 2, seed=1).elements(0, 3000)
    assert np.corrcoef(lines, np.arange(3000))[0, 1] < 0.1
    assert (
        build_shuffle(ExampleShuffle())(EQUAL[:2], 4).elements(0, 9).tolist() == Permutation(2 * ROWS, 4).elements(0, 9).tolist()
    )


def test_a_mixture_keeps_every_corpus_near_its_shards() -> None:
    corpora = {"a": EQUAL[:30], "b": EQUAL[30:]}
    order = MixedOrder(corpora, [Phase(1, {"a": 0.5, "b": 0.5})], num_examples=100_000, capacity=10_000, seed=1, shuffle=NEAR)
    lines = np.concatenate([drawn(order, epoch) for epoch in (1, 2, 3)])
    counts = Counter(lines.tolist())
    assert set(Counter(counts[line] for line in range(30 * ROWS))) == {1}  # 150,000 drawn of as many
    assert set(Counter(counts[line] for line in range(30 * ROWS, 40 * ROWS))) == {3}
    for number in range(order.num_windows):
        assert len(set((order.window(1, number) // ROWS).tolist())) <= 2 * (1 + 1.5 * WINDOW + 2)


def test_a_stream_over_split_ranges_reads_its_lines() -> None:
    ranges = split_at_shards([range(100, 12_000), range(20_000, 26_000)], EQUAL)
    assert ranges == [range(100, 5000), range(5000, 10_000), range(10_000, 12_000), range(20_000, 25_000), range(25_000, 26_000)]
    stream = CorpusStream("a", ranges, seed=1, shuffle=NEAR)
    assert sorted(stream.lines(0, stream.size).tolist()) == [*range(100, 12_000), *range(20_000, 26_000)]
    whole = CorpusStream("a", [range(100, 12_000), range(20_000, 26_000)], seed=1)
    assert np.array_equal(whole.lines(5, 50), CorpusStream("a", ranges, seed=1).lines(5, 50))


def test_ranges_are_split_at_shards_only() -> None:
    runs = CorpusRanges([(0, 5), (1, 5), (0, 10)])
    assert split_at_shards(runs.rows([0]), [range(0, 8), range(8, 8), range(8, 12), range(12, 20)]) == [
        range(0, 5), range(10, 12), range(12, 20),
    ]  # fmt: skip
    assert split_at_shards(runs.rows([1]), [range(20)]) == [range(5, 10)]


def test_a_plan_resumes_exactly_at_any_step() -> None:
    lengths = StoredLengths(*np.random.default_rng(0).integers(1, 20, (2, 4 * ROWS)).astype(np.int32))
    config = BatchingConfig(tokens_per_step=2000, max_tokens=400, shuffle_window=6000)
    order = partial(ShuffledOrder, EQUAL[:4], 6000, 1, shuffle=build_shuffle(ShardWindowShuffle(shards=2)))
    steps = list(StepPlan(lengths, config, seed=1, order=order()).epoch(3))
    assert sorted(np.concatenate([step.examples for step in steps]).tolist()) == list(range(4 * ROWS))
    for start in (1, len(steps) // 2, len(steps) - 1):
        resumed = StepPlan(lengths, config, seed=1, order=order()).epoch(3, start)
        assert [step.examples.tolist() for step in resumed] == [step.examples.tolist() for step in steps[start:]]


@pytest.mark.parametrize(
    ("shuffle", "message"),
    [
        ({"kind": "shard_window", "shards": 1}, "greater than or equal to 2"),
        ({"kind": "examples", "shards": 4}, "Extra inputs are not permitted"),
        ({"kind": "none"}, "examples.*shard_window"),
    ],
)
def test_mistakes_of_the_shuffle(shuffle: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(ShuffleConfig).validate_python(shuffle)
