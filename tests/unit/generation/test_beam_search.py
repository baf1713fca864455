"""Beam search against exhaustive search, a greedy loop, its slow twin, and itself in other batches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dstrain.generation.beam_search import beam_search
from dstrain.generation.config import BeamSearchConfig
from dstrain.generation.hypothesis import Hypothesis
from dstrain.generation.scoring import score_targets
from tests.equivalence.slow_beam_search import Slow
from tests.unit.generation.toy import IDS, ToyModel, log_probs, random_sources, sequences

EOS, PAD, UNK = IDS.eos, IDS.pad, IDS.unk


Rows = list[list[int]]


def search(
    model: ToyModel, sources: Rows, config: BeamSearchConfig, max_lengths: list[int], prefix: Rows | None = None
) -> list[list[Hypothesis]]:
    forced = None if prefix is None else torch.tensor(prefix)
    return beam_search(model, sequences(sources), config=config, ids=IDS, max_lengths=max_lengths, prefix=forced)


def slow(model: ToyModel, source: list[int], config: BeamSearchConfig, max_length: int, prefix: list[int]) -> list[Hypothesis]:
    def next_logits(rows: list[list[int]]) -> list[list[float]]:
        state = model.start(sequences([source] * len(rows)), num_sentences=len(rows), rows_per_sentence=1, max_length=99)
        return model.step(torch.tensor([[EOS, *row] for row in rows]), state)[:, -1].tolist()

    twin = Slow(
        next_logits,
        config.beam_size,
        max_length,
        min_length=config.min_length,
        length_penalty=config.length_penalty,
        normalized=config.score == "normalized",
        temperature=config.temperature,
        unk_penalty=config.unk_penalty,
        no_repeat_ngram=config.no_repeat_ngram,
        groups=config.groups,
        diversity=config.diversity,
        prefix=prefix,
    )
    return [Hypothesis(*found) for found in twin.run()]


def assert_same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [h.tokens for h in found] == [h.tokens for h in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-5, abs=1e-6)
        assert one.token_scores == pytest.approx(other.token_scores, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 1.7])
def test_a_beam_of_the_size_of_the_tree_equals_exhaustive_search(seed: int, length_penalty: float) -> None:
    """4 tokens besides <pad> and EOS, at most 3 of them: 1 + 4 + 16 + 64 sentences."""
    model = ToyModel(6, seed=seed)
    source = random_sources(1, 6, seed=seed)[0]
    every: list[Hypothesis] = []
    for length in range(4):
        for body in itertools.product([0, 3, 4, 5], repeat=length):
            tokens = [*body, EOS]
            scores = [log_probs(model, source, tokens[:i])[token] for i, token in enumerate(tokens)]
            every.append(Hypothesis(tokens, sum(scores) / len(tokens) ** length_penalty, scores))
    every.sort(key=lambda hypothesis: -hypothesis.score)
    config = BeamSearchConfig(beam_size=85, num_best=85, min_length=0, length_penalty=length_penalty)
    found = search(model, [source], config, [3])[0]
    assert len(found) == 85
    assert_same(found[:20], every[:20])
    assert {tuple(h.tokens) for h in found} == {tuple(h.tokens) for h in every}


@pytest.mark.parametrize("seed", range(8))
def test_a_beam_of_one_is_the_greedy_loop(seed: int) -> None:
    model = ToyModel(40, seed=seed)
    source = random_sources(1, 40, seed=seed)[0]
    tokens: list[int] = []
    while not tokens or tokens[-1] != EOS:
        row = log_probs(model, source, tokens)
        allowed = [EOS] if len(tokens) == 12 else [t for t in range(40) if t != PAD and (t != EOS or tokens)]
        tokens.append(max(allowed, key=lambda token: row[token]))
    assert search(model, [source], BeamSearchConfig(beam_size=1), [12])[0][0].tokens == tokens


CONFIGS = {
    "plain": {},
    "one": {"beam_size": 1},
    "short": {"length_penalty": 0.3},
    "long": {"length_penalty": 1.8},
    "sum": {"score": "sum"},
    "min": {"min_length": 4},
    "from zero": {"min_length": 0},
    "unk": {"unk_penalty": 3.0},
    "favor unk": {"unk_penalty": -4.0},
    "warm": {"temperature": 1.6},
    "cold": {"temperature": 0.4},
    "no bigram": {"no_repeat_ngram": 2},
    "no trigram": {"no_repeat_ngram": 3},
    "no token twice": {"no_repeat_ngram": 1},
    "two groups": {"groups": 2},
    "three groups": {"beam_size": 6, "groups": 3, "diversity": 1.1},
    "groups of one": {"groups": 4, "diversity": 0.2},
    "all at once": {
        "groups": 2,
        "no_repeat_ngram": 2,
        "min_length": 3,
        "unk_penalty": 1.0,
        "temperature": 0.8,
        "length_penalty": 0.5,
    },
}


@pytest.mark.parametrize("vocab_size", [9, 150])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_batch_finds_what_the_slow_twin_finds_sentence_by_sentence(name: str, vocab_size: int) -> None:
    options = {"beam_size": 4, **CONFIGS[name]}
    config = BeamSearchConfig(num_best=options["beam_size"], **options)
    model = ToyModel(vocab_size, seed=3, sharpness=1.2)
    sources = random_sources(7, vocab_size, seed=5)
    max_lengths = [9, 4, 7, 9, 5, 6, 8]
    found = search(model, sources, config, max_lengths)
    for source, max_length, hypotheses in zip(sources, max_lengths, found, strict=True):
        assert_same(hypotheses, slow(model, source, config, max_length, []))


@pytest.mark.parametrize("num_best", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_best_are_those_of_a_search_that_goes_on(name: str, num_best: int) -> None:
    """The twin goes on until K hypotheses are finished, however little those that come can score."""
    options = {"beam_size": 4, **CONFIGS[name]}
    config = BeamSearchConfig(num_best=min(num_best, options["beam_size"]), **options)
    model = ToyModel(9, seed=3, sharpness=3.0)
    sources = random_sources(12, 9, seed=7)
    max_lengths = [9, 4, 7, 9, 5, 6, 8, 30, 20, 12, 10, 11]
    found = search(model, sources, config, max_lengths)
    for source, max_length, hypotheses in zip(sources, max_lengths, found, strict=True):
        assert_same(hypotheses, slow(model, source, config, max_length, [])[: config.num_best])


@pytest.mark.parametrize(("options", "ends_early"), [({"score": "sum"}, True), ({"score": "sum", "unk_penalty": -0.1}, False)])
def test_a_search_ends_when_nothing_can_win_any_more(options: dict[str, object], ends_early: bool) -> None:
    """A negative penalty makes further tokens worth something, so nothing is certain before all are finished."""
    sources, lengths = random_sources(6, 25), [20] * 6
    steps = []
    for num_best in (1, 4):
        model = ToyModel(25, seed=7, sharpness=3.0)
        search(model, sources, BeamSearchConfig(beam_size=4, num_best=num_best, **options), lengths)
        steps.append(sum(model.steps))
    assert (steps[0] < steps[1]) == ends_early


@pytest.mark.parametrize("name", ["plain", "no bigram", "min", "two groups"])
def test_prefixes_of_unequal_length_are_forced(name: str) -> None:
    config = BeamSearchConfig(beam_size=4, num_best=4, **CONFIGS[name])
    model = ToyModel(30, seed=4)
    sources = random_sources(4, 30, seed=6)
    prefixes = [[7, 8, 9], [5], [], [UNK, 4]]
    found = search(model, sources, config, [8] * 4, [[*prefix, *[PAD] * (3 - len(prefix))] for prefix in prefixes])
    for source, prefix, hypotheses in zip(sources, prefixes, found, strict=True):
        assert all(h.tokens[: len(prefix)] == prefix for h in hypotheses)
        assert_same(hypotheses, slow(model, source, config, 8, prefix))


def test_a_prefix_that_ends_is_the_only_hypothesis_and_scored_unchanged() -> None:
    model = ToyModel(30, seed=4)
    sources = random_sources(2, 30, seed=6)
    config = BeamSearchConfig(beam_size=3, num_best=3)
    found = search(model, sources, config, [8, 8], [[9, 4, EOS], [9, 4, 11]])
    assert [h.tokens for h in found[0]] == [[9, 4, EOS]]
    assert_same(found[0], score_targets(model, sources[:1], [[9, 4, EOS]], config=config, ids=IDS))
    assert len(found[1]) == 3


def test_no_repetition_allows_what_the_prefix_repeats() -> None:
    model = ToyModel(30, seed=4)
    config = BeamSearchConfig(beam_size=3, no_repeat_ngram=2)
    found = search(model, random_sources(1, 30), config, [9], [[5, 6, 5, 6]])[0][0]
    assert found.tokens[:4] == [5, 6, 5, 6]
    assert math.isfinite(found.score)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_is_said_twice(size: int) -> None:
    model = ToyModel(12, seed=2, sharpness=4.0)
    sources = random_sources(6, 12)
    free = search(model, sources, BeamSearchConfig(beam_size=4, num_best=4), [10] * 6)
    blocked = search(model, sources, BeamSearchConfig(beam_size=4, num_best=4, no_repeat_ngram=size), [10] * 6)

    def repeats(hypotheses: list[list[Hypothesis]]) -> int:
        grams = [[tuple(h.tokens[i : i + size]) for i in range(len(h.tokens) - size + 1)] for hs in hypotheses for h in hs]
        return sum(len(gram) != len(set(gram)) for gram in grams)

    assert repeats(free) > 0
    assert repeats(blocked) == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_other_rows_do_not_change_a_sentence(groups: int) -> None:
    model = ToyModel(60, seed=1)
    sources = random_sources(9, 60, seed=2)
    max_lengths = [3 + len(source) for source in sources]
    config = BeamSearchConfig(beam_size=4, num_best=4, groups=groups)
    together = search(model, sources, config, max_lengths)
    for i, source in enumerate(sources):
        assert_same(together[i], search(model, [source], config, max_lengths[i : i + 1])[0])


def test_finished_sentences_leave_the_batch() -> None:
    model = ToyModel(60, seed=1)
    search(model, random_sources(3, 60), BeamSearchConfig(beam_size=2), [2, 9, 5])
    assert model.steps[0] == 3, "one row a sentence at first"
    assert model.steps[1] == 6
    assert model.steps[-1] <= 2
    assert sorted(model.steps[1:], reverse=True) == model.steps[1:]


@pytest.mark.parametrize("config", [{}, {"temperature": 0.6}, {"unk_penalty": 1.5}, {"score": "sum"}, {"length_penalty": 0.2}])
def test_forced_score_is_search_score(config: dict[str, float]) -> None:
    settings = BeamSearchConfig(beam_size=4, num_best=4, **config)
    model = ToyModel(25, seed=7)
    sources = random_sources(5, 25)
    for source, hypotheses in zip(sources, search(model, sources, settings, [7] * 5), strict=True):
        copies = [source] * len(hypotheses)
        assert_same(hypotheses, score_targets(model, copies, [h.tokens for h in hypotheses], config=settings, ids=IDS))


def test_limits_in_tokens_before_eos() -> None:
    model = ToyModel(25, seed=7)
    found = search(model, random_sources(4, 25), BeamSearchConfig(beam_size=3, num_best=3, min_length=3), [3, 4, 5, 6])
    lengths = [[len(h.tokens) - 1 for h in hypotheses] for hypotheses in found]
    assert lengths[0] == [3, 3, 3]
    assert all(3 <= n <= limit for limit, ns in zip([3, 4, 5, 6], lengths, strict=True) for n in ns)
    assert all(h.tokens[-1] == EOS and EOS not in h.tokens[:-1] for hypotheses in found for h in hypotheses)


def test_diverse_groups_differ_and_never_go_on_beyond_eos() -> None:
    model = ToyModel(25, seed=7, sharpness=3.0)
    sources = random_sources(8, 25)
    found = search(model, sources, BeamSearchConfig(beam_size=4, num_best=4, groups=4, diversity=50.0), [7] * 8)
    assert all(len({h.tokens[0] for h in hypotheses}) == 4 for hypotheses in found)
    assert all(EOS not in h.tokens[:-1] for hypotheses in found for h in hypotheses)


def test_a_sentence_of_nan_has_no_hypothesis_and_does_not_touch_the_others() -> None:
    model = ToyModel(25, seed=7)
    sources = random_sources(3, 24)
    alone = search(model, sources[::2], BeamSearchConfig(beam_size=3), [6, 6])
    model.source_embedding[24] = math.nan
    found = search(model, [sources[0], [24, EOS], sources[2]], BeamSearchConfig(beam_size=3), [6, 6, 6])
    assert found[1] == []
    assert_same(found[0], alone[0])
    assert_same(found[2], alone[1])


def test_what_cannot_be_said_ends_the_search() -> None:
    """Four tokens, none twice, at least nine of them."""
    config = BeamSearchConfig(beam_size=2, no_repeat_ngram=1, min_length=9)
    assert search(ToyModel(6), random_sources(1, 6), config, [20]) == [[]]
