"""Mixtures of corpora: shares by weight and temperature, streams without repetition, the same steps whatever came before."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from dstrain.data.batching.order import CorpusStream, MixedOrder
from dstrain.data.batching.plan import StepPlan, micro_batches, window_capacity
from dstrain.data.config import BatchingConfig
from dstrain.data.lengths import StoredLengths
from dstrain.data.sampling import MixtureConfig, Phase, TemperatureSampling, WeightedSampling
from dstrain.errors import DataError

LINES = {"a": [range(60), range(160, 200)], "b": [range(60, 90)], "c": [range(90, 160)]}
SIZES = {"a": 100, "b": 30, "c": 70}


def mixture(
    shares: dict[str, float], *, examples: int = 200, capacity: int = 64, seed: int = 1, later: tuple[Phase, ...] = ()
) -> MixedOrder:
    return MixedOrder(LINES, [Phase(1, shares), *later], num_examples=examples, capacity=capacity, seed=seed)


def corpus_of(line: int) -> str:
    return next(name for name, ranges in LINES.items() if any(line in part for part in ranges))


def drawn(order: MixedOrder, epoch: int) -> list[int]:
    return [line for number in range(order.num_windows) for line in order.window(epoch, number).tolist()]


def test_a_stream_visits_every_line_before_any_again() -> None:
    stream = CorpusStream("a", LINES["a"], seed=3)
    laps = stream.lines(0, 300).reshape(3, 100)
    expected = [line for part in LINES["a"] for line in part]
    assert [sorted(lap) for lap in laps.tolist()] == [expected] * 3
    assert not np.array_equal(laps[0], laps[1])
    np.testing.assert_array_equal(
        np.concatenate([stream.lines(0, 130), stream.lines(130, 131), stream.lines(131, 300)]), laps.flatten()
    )
    assert len(stream.lines(250, 250)) == 0


def test_an_epoch_has_the_shares_and_every_window_too() -> None:
    order = mixture({"a": 0.5, "b": 0.3, "c": 0.2}, examples=1000, capacity=100)
    assert Counter(map(corpus_of, drawn(order, 1))) == {"a": 500, "b": 300, "c": 200}
    for number in range(order.num_windows):
        assert Counter(map(corpus_of, order.window(1, number).tolist())) == {"a": 50, "b": 30, "c": 20}


def test_each_corpus_is_used_up_before_it_repeats_across_epochs() -> None:
    order = mixture({"a": 0.25, "b": 0.5, "c": 0.25})
    lines = [line for epoch in range(1, 7) for line in drawn(order, epoch)]
    counts = Counter(lines)
    for name, ranges in LINES.items():
        own = [counts[line] for part in ranges for line in part]
        assert max(own) - min(own) <= 1, name
        assert sum(own) == {"a": 300, "b": 600, "c": 300}[name]
    assert drawn(order, 1) != drawn(order, 2)


def test_windows_mix_the_corpora() -> None:
    """Sorting by length is stable: equal lengths keep the order of a window, which must not be corpus by corpus."""
    names = [corpus_of(line) for line in mixture({"a": 0.5, "b": 0.25, "c": 0.25}, capacity=200).window(1, 0).tolist()]
    changes = sum(one != other for one, other in pairwise(names))
    assert changes > 80  # about 125 of 199 at random, 2 if corpora followed one another


def test_a_curriculum_changes_the_shares_and_goes_on_in_each_corpus() -> None:
    order = mixture({"a": 1.0, "b": 0.0, "c": 0.0}, examples=80, later=(Phase(3, {"a": 0.25, "b": 0.75, "c": 0.0}),))
    epochs = [drawn(order, epoch) for epoch in range(1, 6)]
    assert [Counter(map(corpus_of, lines)) for lines in epochs] == [{"a": 80}] * 2 + [{"a": 20, "b": 60}] * 3
    counts = Counter(line for lines in epochs for line in lines if corpus_of(line) == "a")
    assert (len(counts), min(counts.values()), max(counts.values())) == (100, 2, 3)  # 80 + 80 + 20 + 20 + 20 of 100


def test_a_curriculum_by_steps_is_one_by_examples() -> None:
    """Steps of 50 targets, each of 10 examples of 5: with 30 examples an epoch, epoch 5 begins with step 12."""
    config = BatchingConfig(tokens_per_step=50, bucket_tokens=50, max_tokens=50)
    order = mixture({"a": 1.0, "b": 0.0, "c": 0.0}, examples=30, later=(Phase(5, {"a": 0.0, "b": 1.0, "c": 0.0}),))
    plan = StepPlan(StoredLengths(*np.full((2, 200), 5)), config, seed=1, order=order)
    steps = [step for epoch in range(1, 7) for step in plan.epoch(epoch)]
    assert [{corpus_of(line) for line in step.examples.tolist()} for step in steps] == [{"a"}] * 12 + [{"b"}] * 6


def test_a_corpus_keeps_its_order_if_others_join() -> None:
    alone = MixedOrder({"a": LINES["a"]}, [Phase(1, {"a": 1.0})], num_examples=50, capacity=100, seed=1)
    joined = mixture({"a": 0.5, "b": 0.25, "c": 0.25}, examples=100, capacity=100)
    assert sorted(drawn(alone, 1)) == sorted(line for line in drawn(joined, 1) if corpus_of(line) == "a")


def test_steps_do_not_depend_on_ranks_or_on_where_they_begin() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, (2, 200))
    config = BatchingConfig(tokens_per_step=60, max_tokens=40, shuffle_window=64)
    order = mixture({"a": 0.2, "b": 0.5, "c": 0.3}, capacity=window_capacity(config))
    plan = StepPlan(StoredLengths(*lengths), config, seed=1, order=order)
    steps = list(plan.epoch(2))
    assert sorted(np.concatenate([step.examples for step in steps]).tolist()) == sorted(drawn(order, 2))
    assert [step.last_of_epoch for step in steps] == [False] * (len(steps) - 1) + [True]
    assert all(step.num_targets == lengths[1, step.examples].sum() for step in steps)
    for start in (1, len(steps) // 2, len(steps) - 1):
        resumed = list(StepPlan(StoredLengths(*lengths), config, seed=1, order=order).epoch(2, start))
        assert [step.examples.tolist() for step in resumed] == [step.examples.tolist() for step in steps[start:]]
    for ranks in (1, 3):
        groups = micro_batches(steps[0].examples, *lengths[:, steps[0].examples], 40, ranks)
        assert sorted(np.concatenate(groups).tolist()) == sorted(steps[0].examples.tolist())
    assert abs(plan.steps_per_epoch() - len(steps)) <= 0.05 * len(steps) + 1


def test_temperature_is_the_paper_s_formula() -> None:
    """p_i proportional to n_i^(1/T), of 1,000,000 : 10,000 examples."""
    sizes = {"big": 1_000_000, "small": 10_000}
    for temperature, small in ((1, 1 / 101), (2, 1 / 11), (5, 1 / (1 + 100**0.2))):
        (phase,) = TemperatureSampling(temperature=temperature).phases(sizes)
        assert phase.from_epoch == 1
        assert phase.shares == pytest.approx({"big": 1 - small, "small": small})


def test_weights_are_shares_whatever_the_sizes() -> None:
    changes = [{"from_epoch": 4, "weights": {"a": 0, "b": 1, "c": 0}}]
    sampling = WeightedSampling.model_validate({"weights": {"a": 2, "b": 1, "c": 1}, "changes": changes})
    assert sampling.phases(SIZES) == [Phase(1, {"a": 0.5, "b": 0.25, "c": 0.25}), Phase(4, {"a": 0, "b": 1, "c": 0})]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"kind": "weights", "weights": {"a": 0, "b": 0}}, "weights add up to 0, so no example would be drawn"),
        (
            {"kind": "weights", "weights": {"a": 1}, "changes": [{"from_epoch": 2, "weights": {"a": 0}}]},
            "changes.0.weights add up to 0",
        ),
        (
            {"kind": "weights", "weights": {"a": 1}, "changes": [{"from_epoch": 3, "weights": {"a": 1}}] * 2},
            "from_epoch = 3 after 3; list the changes in their order",
        ),
        ({"kind": "weights", "weights": {"a": -1}}, "greater than or equal to 0"),
        ({"kind": "temperature", "temperature": 0.5}, "greater than or equal to 1"),
    ],
)
def test_mistakes_of_sampling(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(MixtureConfig).validate_python(sampling)


def test_a_corpus_without_examples_or_with_too_small_a_share_is_an_error() -> None:
    shares = TemperatureSampling().phases({"a": 100, "b": 0})
    with pytest.raises(DataError, match=r"no example of the corpus b is in the training split, but batching.sampling"):
        MixedOrder({"a": LINES["a"], "b": []}, shares, num_examples=100, capacity=100, seed=1)
    MixedOrder({"a": LINES["a"], "b": []}, [Phase(1, {"a": 1.0, "b": 0.0})], num_examples=100, capacity=100, seed=1)
    with pytest.raises(DataError, match=r"the share of the corpus b, 0.001, is less than one of the 200 examples of an epoch"):
        mixture({"a": 0.999, "b": 0.001, "c": 0.0})
    mixture({"a": 0.999, "b": 0.001, "c": 0.0}, examples=2000)
    mixture({"a": 0.99, "b": 0.01, "c": 0.0})
