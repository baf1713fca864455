"""Draws follow the distribution, within the truncated set, and depend on seed and sentence only."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from dstrain.generation.config import SamplingConfig
from dstrain.generation.hypothesis import Hypothesis
from dstrain.generation.sampling import draw, sample, truncated, uniform_numbers
from dstrain.generation.scoring import score_targets
from tests.unit.generation.toy import IDS, ToyModel, log_probs, random_sources, sequences

EOS, PAD = IDS.eos, IDS.pad


def samples(
    model: ToyModel, sources: list[list[int]], config: SamplingConfig, max_lengths: list[int], first: int = 0
) -> list[list[Hypothesis]]:
    numbers = range(first, first + len(sources))
    return sample(model, sequences(sources), config=config, ids=IDS, max_lengths=max_lengths, sentences=numbers)


def test_frequencies_follow_the_probabilities() -> None:
    """4,000 draws: each first token within four standard deviations of its probability."""
    model, source, count = ToyModel(12, seed=3, sharpness=0.6), [5, 7, EOS], 4000
    config = SamplingConfig(num_best=count, min_length=0, seed=11)
    seen = Counter(h.tokens[0] for h in samples(model, [source], config, [3])[0])
    probs = [math.exp(value) for value in log_probs(model, source, [])]
    allowed = sum(probs) - probs[PAD]
    assert PAD not in seen
    for token, prob in enumerate(probs):
        if token != PAD:
            expected = prob / allowed
            deviation = math.sqrt(expected * (1 - expected) / count)
            assert abs(seen[token] / count - expected) < 4 * deviation + 1e-9, token


def test_temperature_sharpens_the_frequencies_and_the_scores() -> None:
    model, source = ToyModel(12, seed=3, sharpness=0.6), [5, 7, EOS]
    config = SamplingConfig(num_best=2000, min_length=0, temperature=0.3)
    found = samples(model, [source], config, [3])[0]
    row = log_probs(model, source, [], temperature=0.3)
    seen = Counter(h.tokens[0] for h in found)
    best = max((t for t in range(12) if t != PAD), key=lambda token: row[token])
    assert seen[best] / 2000 == pytest.approx(math.exp(row[best]) / (1 - math.exp(row[PAD])), abs=0.05)
    assert all(h.token_scores[0] == pytest.approx(row[h.tokens[0]], rel=1e-4, abs=1e-5) for h in found)


@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_top_k_draws_only_the_k_best(top_k: int) -> None:
    model, source = ToyModel(12, seed=4), [6, EOS]
    row = log_probs(model, source, [])
    best = sorted((t for t in range(12) if t not in (PAD, EOS)), key=lambda token: -row[token])[:top_k]
    seen = {h.tokens[0] for h in samples(model, [source], SamplingConfig(num_best=3000, top_k=top_k), [2])[0]}
    assert seen <= set(best)
    assert top_k > 3 or seen == set(best)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.85, 0.95, 1.0])
def test_top_p_keeps_the_smallest_set_with_more_than_that_mass(top_p: float) -> None:
    row = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]]).log()
    probs, tokens = truncated(row, top_k=None, top_p=top_p)
    assert tokens is not None
    kept = tokens[probs > 0].tolist()
    assert kept == {0.05: [0], 0.5: [0, 1], 0.85: [0, 1, 2], 0.95: [0, 1, 2, 3], 1.0: [0, 1, 2, 3, 4]}[top_p]
    assert probs[probs > 0].tolist() == pytest.approx([[0.4, 0.3, 0.2, 0.06, 0.04][token] for token in kept])


def test_top_p_works_on_what_top_k_left_renormalized() -> None:
    row = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    probs, tokens = truncated(row, top_k=2, top_p=0.55)
    assert tokens is not None
    assert tokens.tolist() == [[1, 2]]
    assert probs[0].tolist() == [pytest.approx(4 / 7), 0.0]


def test_what_is_forbidden_has_no_mass() -> None:
    row = torch.tensor([[0.5, 0.3, 0.2]]).log()
    row[0, 0] = -torch.inf
    probs, _ = truncated(row, top_k=None, top_p=None)
    assert probs[0].tolist() == pytest.approx([0.0, 0.6, 0.4])


@pytest.mark.parametrize(("uniform", "column"), [(0.0, 1), (0.24, 1), (0.26, 3), (1 - 1e-16, 3)])
def test_a_uniform_number_picks_by_the_cumulative_mass(uniform: float, column: int) -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    assert draw(probs, torch.tensor([uniform], dtype=torch.float64)).tolist() == [column]


def test_scores_are_those_of_the_whole_distribution() -> None:
    model = ToyModel(25, seed=7)
    sources = random_sources(4, 25)
    config = SamplingConfig(num_best=3, top_k=4, top_p=0.8, temperature=0.7, min_length=2, length_penalty=0.6, unk_penalty=3.0)
    for source, hypotheses in zip(sources, samples(model, sources, config, [6] * 4), strict=True):
        targets = [h.tokens for h in hypotheses]
        expected = score_targets(model, [source] * 3, targets, config=config, ids=IDS)
        for one, other in zip(hypotheses, expected, strict=True):
            assert one.score == pytest.approx(other.score, rel=1e-5)
            assert one.token_scores == pytest.approx(other.token_scores, rel=1e-5, abs=1e-5)


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    model, sources = ToyModel(60, seed=1, sharpness=0.5), random_sources(5, 60)
    one, same, other = ([h[0].tokens for h in samples(model, sources, SamplingConfig(seed=s), [8] * 5)] for s in (3, 3, 4))
    assert one == same
    assert one != other


def test_neither_other_rows_nor_order_nor_other_samples_change_a_draw() -> None:
    model, sources = ToyModel(60, seed=1, sharpness=0.5), random_sources(6, 60)
    max_lengths = [3, 9, 5, 8, 4, 7]
    config = SamplingConfig(num_best=2, seed=5)
    together = samples(model, sources, config, max_lengths)
    for i, source in enumerate(sources):
        alone = samples(model, [source], config, [max_lengths[i]], first=i)[0]
        assert [h.tokens for h in alone] == [h.tokens for h in together[i]]
    assert len({tuple(h.tokens) for hypotheses in together for h in hypotheses}) > 6


def test_equal_sentences_on_different_lines_are_drawn_differently() -> None:
    model = ToyModel(60, seed=1, sharpness=0.5)
    found = samples(model, [[9, 8, EOS]] * 10, SamplingConfig(), [8] * 10)
    assert len({tuple(h[0].tokens) for h in found}) > 5


def test_uniform_numbers_of_a_sentence_do_not_depend_on_the_batch() -> None:
    together = uniform_numbers(1, [4, 9], 3, [5, 20])
    assert torch.equal(together[0, :, :6], uniform_numbers(1, [4], 3, [5])[0])
    assert not torch.equal(together[0, :, :6], together[1, :, :6])
    assert bool(((together >= 0) & (together < 1)).all())


def test_limits_ngrams_and_prefix_hold_for_samples() -> None:
    model, sources = ToyModel(9, seed=2, sharpness=0.3), random_sources(5, 9)
    config = SamplingConfig(num_best=4, min_length=3, no_repeat_ngram=2)
    found = sample(
        model,
        sequences(sources),
        config=config,
        ids=IDS,
        max_lengths=[6] * 5,
        sentences=range(5),
        prefix=torch.tensor([[4, 5]] * 5),
    )
    for hypothesis in (h for hypotheses in found for h in hypotheses):
        bigrams = list(zip(hypothesis.tokens, hypothesis.tokens[1:], strict=False))
        assert len(bigrams) == len(set(bigrams))
        assert hypothesis.tokens[:2] == [4, 5]
        assert 4 <= len(hypothesis.tokens) <= 7
        assert hypothesis.tokens.index(EOS) == len(hypothesis.tokens) - 1
    assert all([h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True) for hypotheses in found)


def test_a_sentence_of_nan_has_no_sample() -> None:
    model = ToyModel(25, seed=7)
    model.source_embedding[24] = math.nan
    found = samples(model, [[5, EOS], [24, EOS]], SamplingConfig(), [6, 6])
    assert len(found[0]) == 1
    assert found[1] == []
