import io
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, pairwise

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.batch import ModelKind
from dstrain.build.training_data import PACKED_MULTIPLE
from dstrain.data.batching.collate import PackedSize
from dstrain.data.batching.plan import IntArray, PlannedStep, StepPlan, evaluation_batches, micro_batches
from dstrain.data.config import BatchingConfig
from dstrain.data.lengths import StoredLengths
from dstrain.errors import DataError
from dstrain.recipe_file import load_recipe
from tests.paths import DATA, ROOT, needs_data

Pairs = list[tuple[int, int]]
LENGTH = st.one_of(st.integers(1, 6), st.integers(1, 60), st.just(1))
PAIRS = st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=200)


def sides(pairs: Pairs) -> tuple[IntArray, IntArray]:
    return np.array([source for source, _ in pairs]), np.array([target for _, target in pairs])


def plan_of(
    pairs: Pairs,
    *,
    tokens_per_step: int = 40,
    max_tokens: int = 60,
    bucket_tokens: int = 4096,
    shuffle_window: int = 50,
    seed: int = 1,
) -> StepPlan:
    config = BatchingConfig(
        tokens_per_step=tokens_per_step, max_tokens=max_tokens, bucket_tokens=bucket_tokens, shuffle_window=shuffle_window
    )
    return StepPlan(StoredLengths(*sides(pairs)), config, seed)


def listed(steps: Sequence[PlannedStep]) -> list[tuple[int, int, list[int], int, bool]]:
    return [(s.epoch, s.index, s.examples.tolist(), s.num_targets, s.last_of_epoch) for s in steps]


def cost(group: IntArray, plan: StepPlan) -> int:
    """Padded tokens as `max_tokens` counts them."""
    return len(group) * int(max(plan.lengths.source[group].max(), plan.lengths.target[group].max())) if len(group) else 0


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    return plan_of(
        draw(PAIRS),
        tokens_per_step=draw(st.integers(1, 200)),
        max_tokens=draw(st.integers(60, 300)),
        bucket_tokens=draw(st.integers(1, 200)),
        shuffle_window=draw(st.integers(1, 250)),
        seed=draw(st.integers(0, 1000)),
    )


def fewest_pieces(lengths: Sequence[int], capacity: int) -> int:
    """Filling from the left is the known optimum for pieces of neighbors."""
    pieces, room = 0, 0
    for length in lengths:
        if length > room:
            pieces, room = pieces + 1, max(capacity, length)
        room -= length
    return pieces


@settings(max_examples=200, deadline=None)
@given(plan=plans(), epoch=st.integers(0, 3))
def test_every_example_is_in_an_epoch_once(plan: StepPlan, epoch: int) -> None:
    steps = list(plan.epoch(epoch))
    rows = np.concatenate([step.examples for step in steps])
    assert rows.dtype == np.int64
    assert sorted(rows) == list(range(len(plan.lengths.target)))


@settings(max_examples=200, deadline=None)
@given(plan=plans())
def test_a_step_knows_its_targets_and_holds_no_more_than_allowed(plan: StepPlan) -> None:
    steps = list(plan.epoch(0))
    for step in steps:
        assert step.num_targets == plan.lengths.target[step.examples].sum()
        assert step.num_targets <= plan.config.tokens_per_step or len(step.examples) == 1
    assert [step.index for step in steps] == list(range(len(steps)))
    assert [step.last_of_epoch for step in steps] == [False] * (len(steps) - 1) + [True]


@settings(max_examples=100, deadline=None)
@given(plan=plans(), data=st.data())
def test_starting_later_gives_the_rest(plan: StepPlan, data: st.DataObject) -> None:
    whole = listed(list(plan.epoch(2)))
    start = data.draw(st.integers(0, len(whole)))
    assert listed(list(plan.epoch(2, start))) == whole[start:]
    with pytest.raises(DataError, match=rf"epoch 2 has {len(whole)} steps, not {len(whole) + 1}: "):
        list(plan.epoch(2, len(whole) + 1))


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS, max_tokens=st.integers(60, 10_000))
def test_micro_batch_size_does_not_move_the_steps(pairs: Pairs, max_tokens: int) -> None:
    """Nor does the number of ranks, which a plan never learns."""
    assert listed(list(plan_of(pairs, max_tokens=max_tokens).epoch(1))) == listed(list(plan_of(pairs).epoch(1)))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(LENGTH, min_size=1, max_size=200), tokens_per_step=st.integers(1, 300))
def test_one_window_is_cut_into_the_fewest_steps(lengths: list[int], tokens_per_step: int) -> None:
    pairs = [(length, length) for length in lengths]
    steps = list(plan_of(pairs, tokens_per_step=tokens_per_step, shuffle_window=1000).epoch(0))
    assert len(steps) == fewest_pieces(sorted(lengths), tokens_per_step)


def test_steps_are_equally_full() -> None:
    """No remainder: 211 sentences of 20 into steps of at most 300 make 15 steps of 280 or 300, not 14 of 300 and one of 20."""
    steps = list(plan_of([(20, 20)] * 211, tokens_per_step=300, shuffle_window=1000).epoch(0))
    assert len(steps) == 15
    assert {step.num_targets for step in steps} == {280, 300}


def test_the_steps_of_an_epoch_are_counted_without_making_them() -> None:
    """Exactly for one window; a little too low for several."""
    lengths = [(5 + number % 30, 5 + number % 40) for number in range(4000)]
    for window in (4000, 500):
        plan = plan_of(lengths, tokens_per_step=100, bucket_tokens=50, shuffle_window=window)
        counts = [len(list(plan.epoch(epoch))) for epoch in (1, 2)]
        expected = [counts[0]] if window == 4000 else range(counts[0] * 97 // 100, min(counts))
        assert plan.steps_per_epoch() in expected


def test_windows_are_of_equal_size() -> None:
    """1,001 examples in windows of at most 1,000 are two halves, not 1,000 and a last step of one sentence."""
    steps = list(plan_of([(20, 20)] * 1001, tokens_per_step=300, shuffle_window=1000).epoch(0))
    assert min(step.num_targets for step in steps) > 250


def test_a_window_smaller_than_a_step_still_fills_steps() -> None:
    steps = list(plan_of([(10, 10)] * 500, tokens_per_step=100, shuffle_window=1).epoch(0))
    assert {step.num_targets for step in steps} == {100}


def test_steps_hold_similar_lengths_and_come_in_random_order() -> None:
    random = np.random.default_rng(0)
    pairs = [(int(length), int(length)) for length in random.integers(1, 50, 5000)]
    plan = plan_of(pairs, tokens_per_step=1000, shuffle_window=5000)
    means = []
    for step in plan.epoch(0):
        widths = np.maximum(plan.lengths.source[step.examples], plan.lengths.target[step.examples])
        assert widths.max() - widths.min() <= 4
        means.append(widths.mean())
    place = np.arange(len(means))
    assert abs(np.corrcoef(place, means)[0, 1]) < 4 / np.sqrt(len(means))


def test_a_step_of_several_buckets_holds_short_and_long_sentences() -> None:
    """A bucket of neighbors in length from each third of the corpus; no two epochs alike."""
    random = np.random.default_rng(0)
    pairs = [(int(length), int(length)) for length in random.integers(1, 50, 5000)]
    plan = plan_of(pairs, tokens_per_step=3000, bucket_tokens=1000, shuffle_window=5000)
    mixed = list(plan.epoch(0))
    thirds = np.quantile(np.repeat(plan.lengths.target, plan.lengths.target), [1 / 3, 2 / 3])
    full = [step for step in mixed if step.num_targets > 2500]
    assert len(mixed) - len(full) <= 2  # those that the last buckets do not go round to
    assert min(step.num_targets for step in mixed) > 1800
    for step in full:
        lengths = plan.lengths.target[step.examples]
        middle = (lengths >= thirds[0] - 1) & (lengths <= thirds[1] + 1)
        assert lengths.min() <= thirds[0] and middle.any() and lengths.max() >= thirds[1]
        assert len(np.unique(lengths)) <= 12
    alone = list(plan_of(pairs, tokens_per_step=3000, shuffle_window=5000).epoch(0))
    spread = [np.std([plan.lengths.target[step.examples].mean() for step in steps]) for steps in (mixed, alone)]
    assert spread[0] < 0.6 * spread[1]
    assert listed(list(plan.epoch(1))) != listed(mixed)


def test_a_long_sentence_makes_the_buckets_larger() -> None:
    """A bucket holds the longest sentence of its window, so that no step exceeds its tokens."""
    plan = plan_of([(5, 5)] * 200 + [(25, 25)], tokens_per_step=30, bucket_tokens=5)
    assert max(step.num_targets for step in plan.epoch(0)) <= 30


def test_long_sentences_do_not_wait_for_the_end() -> None:
    """Each tenth of an epoch has its share of the longest sentences."""
    random = np.random.default_rng(0)
    pairs = [(10, int(length)) for length in random.geometric(0.1, 20_000).clip(1, 60)]
    plan = plan_of(pairs, tokens_per_step=500, shuffle_window=1000)
    order = np.concatenate([step.examples for epoch in range(5) for step in plan.epoch(epoch)])
    longest = plan.lengths.target[order] >= 35
    shares = longest.reshape(5, 10, -1).sum(axis=(0, 2))  # (10,)
    assert np.all(np.abs(shares - shares.mean()) < 5 * np.sqrt(shares.mean()))


def test_equal_lengths_are_put_together_differently_in_each_epoch_and_seed() -> None:
    pairs = [(10, 10)] * 100
    orders = [
        np.concatenate([step.examples for step in plan_of(pairs, seed=seed).epoch(epoch)]).tolist()
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_plan_is_fixed_for_ever() -> None:
    """Another plan from the same seed would break every saved position."""
    plan = plan_of([(3, 1 + row % 5) for row in range(12)], tokens_per_step=10, shuffle_window=6, seed=5)
    assert [(step.examples.tolist(), step.num_targets) for step in plan.epoch(3)] == [
        ([3, 9], 9),
        ([1, 0, 5, 8], 8),
        ([2, 7, 11], 8),
        ([6, 10, 4], 8),
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_the_type_of_the_lengths_does_not_matter(dtype: type[np.integer]) -> None:
    random = np.random.default_rng(0)
    source, target = random.integers(1, 100, (2, 500))
    config = BatchingConfig(tokens_per_step=300, max_tokens=100, shuffle_window=100)
    expected = listed(list(StepPlan(StoredLengths(source, target), config, 1).epoch(0)))
    assert listed(list(StepPlan(StoredLengths(source.astype(dtype), target.astype(dtype)), config, 1).epoch(0))) == expected


def test_lengths_beyond_16_bits() -> None:
    plan = plan_of([(100_000, 5), (3, 70_000), (3, 3), (66_000, 4_464)], max_tokens=100_000, tokens_per_step=10)
    steps = list(plan.epoch(0))
    assert sorted(step.num_targets for step in steps) == [3, 5, 4_464, 70_000]


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="the training split holds no example"):
        StepPlan(StoredLengths(np.zeros(0, np.int32), np.zeros(0, np.int32)), BatchingConfig(tokens_per_step=1, max_tokens=1), 1)


@pytest.mark.parametrize(("pair", "side"), [((61, 2), "source"), ((2, 61), "target")])
def test_a_sentence_that_fits_nowhere_is_named(pair: tuple[int, int], side: str) -> None:
    message = (
        f"training example 2 has 61 {side} tokens, over batching.max_tokens 60; raise that, "
        f"or lower data.filter.max_{side}_length and prepare again"
    )
    with pytest.raises(DataError, match=f"^{message}$"):
        plan_of([(60, 60), (1, 1), pair])


@settings(max_examples=200, deadline=None)
@given(plan=plans(), world_size=st.integers(1, 9))
def test_micro_batches_share_a_step_among_ranks(plan: StepPlan, world_size: int) -> None:
    max_tokens = plan.config.max_tokens
    for step in plan.epoch(0):
        groups = micro_batches(step.examples, *plan.lengths.of(0, step.examples), max_tokens, world_size)
        assert sorted(np.concatenate(groups)) == sorted(step.examples)
        assert len(groups) % world_size == 0
        assert all(cost(group, plan) <= max_tokens for group in groups)
        assert all(len(group) for group in groups) or len(step.examples) < len(groups)
        few = micro_batches(step.examples, *plan.lengths.of(0, step.examples), max_tokens, 1)
        assert len(groups) - world_size < len(few) <= len(groups)


@settings(max_examples=200, deadline=None)
@given(pairs=PAIRS, tokens=st.integers(119, 400), world_size=st.integers(1, 4))
def test_concatenated_sides_are_counted_together(pairs: Pairs, tokens: int, world_size: int) -> None:
    """A row of a decoder-only model is as wide as the longest example of the batch, its source and target concatenated."""
    source, target = sides(pairs)
    config = BatchingConfig(tokens_per_step=150, max_tokens=tokens)
    plan = StepPlan(StoredLengths(source, target), config, 1, kind="decoder_only")
    assert listed(list(plan.epoch(0))) == listed(list(StepPlan(plan.lengths, config, 1).epoch(0))), "the steps are the same"
    groups = [
        group
        for step in plan.epoch(0)
        for group in micro_batches(step.examples, *plan.lengths.of(0, step.examples), tokens, world_size, kind="decoder_only")
        if len(group)
    ]
    assert sorted(np.concatenate(groups)) == list(range(len(pairs)))
    assert all(len(group) * (source[group] + target[group] - 1).max() <= tokens for group in groups)
    batches = evaluation_batches(source, target, 70, kind="decoder_only")
    assert sorted(np.concatenate(batches)) == list(range(len(pairs)))
    assert all(len(rows) == 1 or len(rows) * (source[rows] + target[rows] - 1).max() <= 70 for rows in batches)


def test_sides_that_fit_separately_but_not_concatenated_are_named() -> None:
    config = BatchingConfig(tokens_per_step=40, max_tokens=50)
    lengths = np.array([5, 30], np.uint16), np.array([5, 22], np.uint16)
    StepPlan(StoredLengths(*lengths), config, 1)
    with pytest.raises(DataError, match=r"training example 1 has 51 source and target tokens, over batching\.max_tokens 50"):
        StepPlan(StoredLengths(*lengths), config, 1, kind="decoder_only")


def best_worst_cost(widths: Sequence[int], pieces: int) -> int:
    """Over all ways to cut ascending widths into at most `pieces` groups, the smallest cost of the costliest: dynamic program."""
    best = [0] + [10**9] * len(widths)
    for _ in range(pieces):
        best = [0] + [
            min(max(best[start], (end - start) * widths[end - 1]) for start in range(end)) for end in range(1, len(widths) + 1)
        ]
    return best[-1]


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=25), world_size=st.integers(1, 5))
def test_micro_batches_are_few_and_balanced(pairs: Pairs, world_size: int) -> None:
    max_tokens = 70
    source, target = sides(pairs)
    groups = micro_batches(np.arange(len(pairs)), source, target, max_tokens, world_size)
    widths = sorted(max(pair) for pair in pairs)
    fewest = next(n for n in range(world_size, 1000, world_size) if best_worst_cost(widths, n) <= max_tokens)
    assert len(groups) == fewest
    worst = max(len(group) * max(source[group].max(), target[group].max()) for group in groups if len(group))
    assert worst == best_worst_cost(widths, fewest)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=12), num_ranks=st.integers(1, 3))
def test_packed_micro_batches_are_filled_by_their_tokens(kind: ModelKind, pairs: Pairs, num_ranks: int) -> None:
    """As few as any cut of the sorted examples allows, and the costliest as cheap as any."""
    max_tokens = 130
    lengths = np.stack(sides(pairs))
    read = lengths if kind == "encoder_decoder" else lengths.sum(0, keepdims=True) - 1
    groups = micro_batches(np.arange(len(pairs)), *lengths, max_tokens, num_ranks, kind=kind, packed=True)
    assert sorted(np.concatenate(groups)) == list(range(len(pairs)))
    ordered = read[:, np.concatenate(groups)]
    assert ordered.max(0).tolist() == sorted(read.max(0))

    def worst_costs(cuts: int) -> Iterator[int]:
        """The costliest group, for every way to cut the examples so often."""
        for ends in combinations(range(1, len(pairs)), min(cuts, len(pairs) - 1)):
            yield max(int(ordered[:, start:end].sum(1).max()) for start, end in pairwise([0, *ends, len(pairs)]))

    best = {count: min(worst_costs(count - 1)) for count in range(num_ranks, 13 + num_ranks, num_ranks)}
    fewest = min(count for count, cost in best.items() if cost <= max_tokens)
    assert len(groups) == fewest
    assert max(int(read[:, group].sum(1).max()) for group in groups) == best[fewest]


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(LENGTH, LENGTH), max_size=100), max_tokens=st.integers(1, 100))
def test_evaluation_sees_every_example_once(pairs: Pairs, max_tokens: int) -> None:
    source, target = sides(pairs)
    batches = evaluation_batches(source.astype(np.int64), target.astype(np.int64), max_tokens)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(pairs)))
    widths = [np.maximum(source, target)[batch] for batch in batches]
    assert all(
        len(batch) and (len(batch) * width.max() <= max_tokens or len(batch) == 1)
        for batch, width in zip(batches, widths, strict=True)
    )
    assert all(before.max() <= after.min() for before, after in pairwise(widths))


def test_the_predecessors_lost_sentences_are_all_here() -> None:
    """Cases that lose data elsewhere: 20 sentences of 50 tokens at 300, a set of 5, a set of 21."""
    for size, length, max_tokens in ((20, 50, 300), (5, 10, 130), (21, 10, 130), (37, 12, 300), (403, 9, 130)):
        lengths = np.full(size, length)
        assert sum(map(len, evaluation_batches(lengths, lengths, max_tokens))) == size
        plan = plan_of([(length, length)] * size, tokens_per_step=max_tokens, max_tokens=max_tokens)
        assert sum(len(step.examples) for step in plan.epoch(0)) == size


@needs_data
@pytest.mark.parametrize("world_size", [1, 2])
def test_padding_of_real_text(multi30k_lengths: tuple[IntArray, IntArray], world_size: int) -> None:
    """Both sides of Multi30k, cut into 8,000 joint pieces, with the recipe's batching: under 10 % of padding."""
    source, target = multi30k_lengths
    config = load_recipe("translation/multi30k_tiny").batching
    real = padded = 0
    for step in StepPlan(StoredLengths(source, target), config, seed=1).epoch(0):
        for group in micro_batches(step.examples, source[step.examples], target[step.examples], config.max_tokens, world_size):
            real += int(source[group].sum() + target[group].sum())
            padded += len(group) * int(source[group].max() + target[group].max())
    assert real == source.sum() + target.sum()
    assert padded < 1.10 * real


@needs_data
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_packed_pairs_of_real_text_are_padded_by_less_than_two_percent(
    multi30k_lengths: tuple[IntArray, IntArray], kind: ModelKind
) -> None:
    """As a GPU gets them, 4,096 tokens at most and a multiple of 64."""
    source, target = multi30k_lengths
    config = load_recipe("translation/multi30k_tiny").batching
    real, padded, size = 0, 0, PackedSize(PACKED_MULTIPLE)
    for step in StepPlan(StoredLengths(source, target), config, seed=1, kind=kind).epoch(1):
        lengths = source[step.examples], target[step.examples]
        for group in micro_batches(step.examples, *lengths, config.max_tokens, 1, kind=kind, packed=True):
            of_side = [int(source[group].sum()), int(target[group].sum())]
            read = of_side if kind == "encoder_decoder" else [sum(of_side) - len(group)]
            assert max(read) <= config.max_tokens == 4096
            real, padded = real + sum(read), padded + sum(map(size.of, read))
    assert real < padded < real / 0.98


@pytest.fixture(scope="module")
def multi30k_lengths() -> tuple[IntArray, IntArray]:
    sides = [(DATA / "multi30k" / f"train.{language}").read_text().splitlines() for language in ("en", "de")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=chain(*sides), model_writer=model, vocab_size=8000, model_type="bpe", minloglevel=2
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    source, target = (np.array([len(ids) + 1 for ids in processor.encode(lines)]) for lines in sides)
    return source, target


def peak_of_planning(size: int) -> int:
    """Bytes that planning one epoch adds to the lengths."""
    lengths = np.random.default_rng(0).integers(1, 60, size).astype(np.int32)
    config = BatchingConfig(tokens_per_step=3465, max_tokens=4096, shuffle_window=50_000)
    tracemalloc.start()
    assert sum(len(step.examples) for step in StepPlan(StoredLengths(lengths, lengths), config, seed=1).epoch(0)) == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_is_that_of_a_window() -> None:
    assert peak_of_planning(2_000_000) < 1.1 * peak_of_planning(200_000)


def test_the_bench_plans_a_million_examples_in_seconds() -> None:
    figures = bench(1_000_000)
    assert figures["examples"] == 1_000_000
    assert figures["cpu_seconds"] < 6
    assert figures["fullness_percent"] > 99


@pytest.mark.slow
def test_planning_100_million_examples_takes_under_a_minute_and_2_gib() -> None:
    figures = bench(100_000_000)
    assert figures["cpu_seconds"] < 60
    assert figures["peak_mib"] < 2048


@pytest.mark.slow
def test_planning_100_corpora_of_100_million_examples_takes_under_90_seconds_and_2_gib_and_a_half() -> None:
    figures = bench(100_000_000, "--corpora", "100")
    assert figures["fullness_percent"] > 99
    assert figures["cpu_seconds"] < 90
    assert figures["peak_mib"] < 2560


def bench(size: int, *options: str) -> dict[str, float]:
    command = [sys.executable, ROOT / "tools" / "bench_plan.py", "--examples", str(size), "--json", *options]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=280).stdout)
