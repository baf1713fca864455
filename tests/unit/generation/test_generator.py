"""Every line gives a line, in the order of the input, whatever the batches are."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest

from dstrain.data.batching.plan import batches_by_length
from dstrain.errors import DataError
from dstrain.generation.config import BeamSearchConfig, SamplingConfig
from dstrain.generation.generator import Generator
from dstrain.generation.padding import pad
from dstrain.log import logger
from dstrain.models.config import LengthLimits
from tests.unit.generation.toy import IDS, ToyModel, random_sources

SOURCES = random_sources(23, 40, seed=8)


def generator(
    config: BeamSearchConfig | SamplingConfig, *, max_source: int = 50, max_target: int = 50, truncate: bool = False
) -> Generator:
    model = ToyModel(40, seed=5)
    return Generator(model, config, IDS, limits=LengthLimits(max_source, max_target, joint=False), truncate_source=truncate)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("config", [BeamSearchConfig(beam_size=3), SamplingConfig(num_best=2, top_k=9)])
def test_answers_stand_in_input_order_whatever_the_batch_size(config: BeamSearchConfig | SamplingConfig) -> None:
    alone = [generator(config).translate_ids([source], first_line=line)[0] for line, source in enumerate(SOURCES, 1)]
    for max_tokens in (1, 40, 150, 100_000):
        found = generator(config.model_copy(update={"max_tokens": max_tokens})).translate_ids(SOURCES)
        assert [h[0].tokens for h in found] == [h[0].tokens for h in alone]
        assert [h[0].score for h in found] == pytest.approx([h[0].score for h in alone], rel=1e-5)


def test_a_source_without_tokens_has_an_empty_hypothesis_and_the_model_is_not_asked() -> None:
    translator = generator(BeamSearchConfig(beam_size=2))
    found = translator.translate_ids([[2], [2]])
    assert [(h.tokens, h.score, h.token_scores) for (h,) in found] == [([2], 0.0, [0.0])] * 2
    assert translator.model.steps == []
    mixed = translator.translate_ids([[2], SOURCES[0], [2]])
    assert [len(h.tokens) > 1 for (h,) in mixed] == [False, True, False]
    assert translator.translate_ids([]) == []


def test_the_limit_follows_from_the_sentence_only() -> None:
    config = BeamSearchConfig(beam_size=2, min_length=99, max_length_ratio=1.5, max_length_offset=3)
    found = generator(config).translate_ids(SOURCES)
    assert [len(h[0].tokens) - 1 for h in found] == [int(1.5 * len(source)) + 3 for source in SOURCES]


def test_the_limit_never_exceeds_the_model() -> None:
    config = BeamSearchConfig(beam_size=2, min_length=99, max_length_offset=1000)
    found = generator(config, max_target=6).translate_ids(SOURCES[:3])
    assert [len(h[0].tokens) for h in found] == [6, 6, 6]


def test_a_source_that_is_too_long_is_named_by_its_line() -> None:
    sources = [[5, 2], [5] * 7 + [2], [5] * 9 + [2]]
    with pytest.raises(DataError, match=r"source line 101 has 8 tokens .* reads at most 4; split .* --truncate"):
        generator(BeamSearchConfig(), max_source=4).translate_ids(sources, first_line=100)


def test_truncation_cuts_before_eos_and_says_how_many(warnings: pytest.LogCaptureFixture) -> None:
    translator = generator(BeamSearchConfig(beam_size=2), max_source=4, truncate=True)
    sources = [[5, 2], [5, 6, 7, 8, 9, 2], [9, 8, 7, 6, 5, 4, 2]]
    found = translator.translate_ids(sources)
    assert [h[0].tokens for h in found] == [h[0].tokens for h in translator.translate_ids([[5, 2], [5, 6, 7, 2], [9, 8, 7, 2]])]
    assert warnings.messages == ["2 of 3 source lines cut to the model's 4 tokens"]


def test_a_sentence_without_a_finite_score_stays_empty_and_is_counted(warnings: pytest.LogCaptureFixture) -> None:
    translator = generator(BeamSearchConfig(beam_size=2))
    translator.model.source_embedding[39] = math.nan
    found = translator.translate_ids([[39, 2], [5, 2]])
    assert found[0][0].tokens == [2]
    assert found[0][0].score == -math.inf
    assert len(found) == 2
    assert "1 of 2 sentences have no hypothesis of finite score" in warnings.text


def test_progress_counts_every_sentence_once() -> None:
    reported: list[int] = []
    generator(BeamSearchConfig(beam_size=2, max_tokens=60)).translate_ids([[2], *SOURCES], progress=reported.append)
    assert sum(reported) == len(SOURCES) + 1
    assert len(reported) > 3


def test_prefixes_follow_their_sentences() -> None:
    prefixes = [[4 + i % 7] for i in range(len(SOURCES))]
    found = generator(BeamSearchConfig(beam_size=2, max_tokens=60)).translate_ids(SOURCES, prefixes=prefixes)
    assert [h[0].tokens[:1] for h in found] == prefixes


def test_a_prefix_is_never_cut_by_the_length_limit_nor_skipped_for_an_empty_source() -> None:
    config = BeamSearchConfig(beam_size=2, max_length_ratio=0, max_length_offset=1)
    prefix = [4, 5, 6, 7]
    found = generator(config).translate_ids([SOURCES[0], [2], SOURCES[1]], prefixes=[prefix, prefix, []])
    assert [h[0].tokens[:4] for h in found[:2]] == [prefix] * 2
    assert [len(h[0].tokens) for h in found[:2]] == [5, 5]
    assert len(found[2][0].tokens) <= 2


def test_a_prefix_beyond_the_model_is_named_or_cut() -> None:
    with pytest.raises(DataError, match=r"prefix line 8 has 7 tokens .* reads at most 5"):
        generator(BeamSearchConfig(), max_target=5).translate_ids(SOURCES[:2], prefixes=[[], [4] * 6], first_line=7)
    cut = generator(BeamSearchConfig(), max_target=5, truncate=True).translate_ids(SOURCES[:1], prefixes=[[4, 5, 6, 7, 8, 9]])
    assert cut[0][0].tokens == [4, 5, 6, 7, 2]


def test_the_limit_of_an_empty_source_follows_from_its_prefix() -> None:
    config = BeamSearchConfig(beam_size=2, min_length=99, max_length_ratio=1, max_length_offset=3)
    prefixes = [[4], [4, 5, 6, 7], [4, 5]]
    found = generator(config).translate_ids([[2], [2], [5, 6, 7, 2]], prefixes=prefixes)
    assert [len(h[0].tokens) - 1 for h in found] == [2 + 3, 5 + 3, 4 + 3]


def test_a_prefix_after_a_source_in_one_sequence_leaves_positions_for_it() -> None:
    translator = replace(generator(BeamSearchConfig(beam_size=2, max_length_offset=50)), limits=LengthLimits(9, 9, joint=True))
    with pytest.raises(DataError, match=r"prefix line 1 has 6 tokens .* reads at most 5"):
        translator.translate_ids([[5, 6, 7, 8, 2]], prefixes=[[4] * 5])
    found = translator.translate_ids([[5, 6, 7, 8, 2], [5, 6, 2]], prefixes=[[4] * 4, [4] * 4])
    assert [h[0].tokens[:4] for h in found] == [[4] * 4] * 2
    assert [len(h[0].tokens) <= length for h, length in zip(found, (5, 7), strict=True)] == [True, True]


def test_batches_hold_similar_lengths_within_the_budget() -> None:
    lengths = [3, 9, 1, 4, 9, 2, 30, 3]
    batches = batches_by_length(lengths, range(8), 12)
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    assert batches[0] == [6], "longer than the budget: alone"
    assert all(len(batch) * max(lengths[row] for row in batch) <= 12 for batch in batches[1:])


def test_padding_is_on_the_right() -> None:
    tokens, lengths = pad([[5, 2], [], [6, 7, 2]], 1)
    assert tokens.tolist() == [[5, 2, 1], [1, 1, 1], [6, 7, 2]]
    assert lengths.tolist() == [2, 0, 3]
