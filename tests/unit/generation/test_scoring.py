"""Forced scoring against single forward passes. That it equals the scores of a search is shown in test_beam_search.py."""

from __future__ import annotations

import pytest
import torch

from dstrain.data.batching.collate import Collator
from dstrain.generation import scoring
from dstrain.generation.config import BeamSearchConfig
from tests.unit.generation.toy import IDS, ToyModel, log_probs, random_sources, sequences

SOURCES = random_sources(4, 20, seed=3)
TARGETS = [[5, 6, 2], [2], [7, 3, 8, 9, 10, 2], [4, 2]]


@pytest.mark.parametrize("positions", [1, 4, 1000])
def test_each_token_has_its_log_probability_after_those_before(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "POSITIONS", positions)
    model = ToyModel(20, seed=1)
    config = BeamSearchConfig(length_penalty=0.5)
    found = scoring.score_targets(model, SOURCES, TARGETS, config=config, ids=IDS)
    for source, target, hypothesis in zip(SOURCES, TARGETS, found, strict=True):
        expected = [log_probs(model, source, target[:i])[token] for i, token in enumerate(target)]
        assert hypothesis.tokens == target
        assert hypothesis.token_scores == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert hypothesis.score == pytest.approx(sum(expected) / len(target) ** 0.5, rel=1e-5)


def test_the_score_may_stay_a_sum() -> None:
    config = BeamSearchConfig(score="sum")
    for hypothesis in scoring.score_targets(ToyModel(20), SOURCES, TARGETS, config=config, ids=IDS):
        assert hypothesis.score == pytest.approx(sum(hypothesis.token_scores), rel=1e-5)


def test_logits_are_float32_and_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "POSITIONS", 3)
    model = ToyModel(20, seed=1)
    inputs = [[2, *target[:-1]] for target in TARGETS]
    found = scoring.teacher_forced_logits(
        model, SOURCES, inputs, collator=Collator("encoder_decoder", pad_id=IDS.pad, eos_id=IDS.eos)
    )
    assert [tuple(row.shape) for row in found] == [(3, 20), (1, 20), (6, 20), (2, 20)]
    for source, row, logits in zip(SOURCES, inputs, found, strict=True):
        alone = model.project(model(sequences([source]), sequences([row])).hidden)[0]
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-6)
