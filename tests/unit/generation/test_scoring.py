"""Forced scoring against single forward passes. That it equals the scores of a search is shown in test_beam_search.py."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter

from dstrain.batch import Sequences
from dstrain.data.batching.collate import Collator
from dstrain.generation import scoring
from dstrain.generation.beam_search import beam_search
from dstrain.generation.config import BeamSearchConfig, SamplingConfig
from dstrain.generation.padding import pad
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import build_model
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


def test_a_penalty_of_unk_counts_in_a_search_and_not_in_samples() -> None:
    scores = [
        scoring.score_targets(ToyModel(20), SOURCES, [[7, IDS.unk, 2]] * 4, config=config, ids=IDS)[0].token_scores[1]
        for config in (SamplingConfig(), SamplingConfig(unk_penalty=2.0), BeamSearchConfig(unk_penalty=2.0))
    ]
    assert scores[1] == scores[0]
    assert scores[2] == pytest.approx(scores[0] - 2, rel=1e-5)


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


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("scaling", ["dynamic_ntk", "dynamic_yarn"])
def test_under_dynamic_scalings_a_token_is_scored_as_the_search_scores_it(
    kind: str, scaling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last one of its sequence, before the tokens after it change the frequencies."""
    dynamic = {"kind": scaling, "original_length": 6, **({"factor": 2.0} if scaling == "dynamic_ntk" else {})}
    stack = {"depth": 2, "num_heads": 2, "ffn_dim": 32}
    tree = {"kind": kind, "model_dim": 16, "decoder": stack, "position": {"kind": "rotary", "scaling": dynamic}}
    config = TypeAdapter(ModelConfig).validate_python(tree | ({"encoder": stack} if kind == "encoder_decoder" else {}))
    model = build_model(config, VocabularySizes(source=20, target=20), seed=2).eval()
    model.projection.weight.data.mul_(20)
    search = BeamSearchConfig(beam_size=3, num_best=3, min_length=5, unk_penalty=0.5)
    for sources, longest in (([[5, 6, 7, 8, 2], [9, 2], [4, 5, 2]], 14), ([[5, 2], [6, 2]], 5)):
        batch = Sequences(*pad(sources, IDS.pad))
        ranked = beam_search(model, batch, config=search, ids=IDS, max_lengths=[longest] * len(sources))
        for hypotheses in zip(*ranked, strict=True):
            targets = [hypothesis.tokens for hypothesis in hypotheses]
            scored = scoring.score_targets(model, sources, targets, config=search, ids=IDS)
            for found, expected in zip(scored, hypotheses, strict=True):
                assert found.token_scores == pytest.approx(expected.token_scores, rel=1e-4, abs=1e-5)
                assert found.score == pytest.approx(expected.score, rel=1e-5)
    targets = [hypotheses[0].tokens for hypotheses in beam_search(model, batch, config=search, ids=IDS, max_lengths=[14, 14])]
    by_steps = scoring.score_targets(model, sources, targets, config=search, ids=IDS)
    monkeypatch.setattr(type(model), "invalidates_cache", lambda self, length: False)
    at_once = scoring.score_targets(model, sources, targets, config=search, ids=IDS)
    assert max(abs(one.score - other.score) for one, other in zip(by_steps, at_once, strict=True)) > 1e-3
