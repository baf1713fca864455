"""CTranslate2 finds the same tokens with the same scores: greedy, by beam 5, and for given targets, for every kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from dstrain.api import BundleModel, load
from dstrain.checkpoint.bundle import save_bundle
from dstrain.data.batching.collate import Collator
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.interop.ctranslate2.export import export_ctranslate2
from dstrain.interop.ctranslate2.options import CTranslate2Export
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import Model, build_model
from dstrain.models.weights import to_canonical
from tests.unit.generation.small_bundle import NAMES, WORDS, dictionary

ctranslate2 = pytest.importorskip("ctranslate2")

GATED = {"feed_forward": "gated"}
YARN = {"kind": "yarn", "factor": 4, "original_length": 8, "beta_fast": 4}
NTK = {"kind": "ntk", "factor": 8}
ROTARY = {"kind": "rotary", "theta": 100}
PRE: dict[str, Any] = {"norm_order": "pre"}
MODELS: dict[str, dict[str, Any]] = {
    "post-norm, sinusoids, relu": {},
    "pre-norm, learned positions, gelu, tied, normed embedding": PRE
    | {"position": {"kind": "learned"}, "activation": "gelu", "embedding": {"kind": "plain", "tie": "decoder", "norm": True}},
    "all tied, unscaled, gelu_tanh, no positions": {
        "position": {"kind": "none"},
        "activation": "gelu_tanh",
        "embedding": {"kind": "plain", "tie": "all", "scale": False},
    },
    "RMS norm, gated silu, rotary, grouped keys of self-attention": PRE
    | {"norm": {"kind": "rms_norm", "eps": 1e-3}, "activation": "silu", "position": ROTARY}
    | {"encoder": GATED | {"num_kv_heads": 2}, "decoder": GATED | {"num_kv_heads": 1}},
    "post-norm with a norm at the end, gated, grouped keys of cross-attention, part of the head rotated": {
        "norm": {"kind": "rms_norm"},
        "activation": "tanh",
        "position": ROTARY | {"layout": "interleaved", "fraction": 0.5, "scaling": {"kind": "linear", "factor": 3}},
        "encoder": GATED | {"final_norm": "yes"},
        "decoder": GATED | {"final_norm": "yes", "num_cross_kv_heads": 2},
    },
    "YaRN, pre-norm without a norm at the end, more heads in the decoder": PRE
    | {"position": ROTARY | {"fraction": 0.5, "scaling": YARN}, "encoder": {"final_norm": "no", "num_heads": 2}},
    "ALiBi of the decoder, recurrent layers, tied factorized embedding": PRE
    | {
        "position": {"kind": "alibi", "encoder": "none"},
        "encoder": {"depth": 3, "unique_layers": 2},
        "decoder": {"depth": 3, "unique_layers": 1},
        "embedding": {"kind": "factorized", "dim": 6, "tie": "all", "activation": "tanh"},
    },
    "one factorized side, narrow output": {
        "embedding": {"kind": "factorized", "dim": 6, "sides": "source", "output_dim": 10, "activation": "relu"}
    },
    "decoder-only, post-norm, sinusoids": {"kind": "decoder_only"},
    "decoder-only, gated, rotary, NTK, grouped keys": PRE
    | {
        "kind": "decoder_only",
        "norm": {"kind": "rms_norm"},
        "activation": "silu",
        "embedding": {"kind": "plain", "tie": "decoder"},
    }
    | {"position": ROTARY | {"scaling": YARN}, "decoder": GATED | {"num_kv_heads": 2}},
    "decoder-only, ALiBi": PRE | {"kind": "decoder_only", "position": {"kind": "alibi"}},
}
RECIPE = {"data": {"train": [{"kind": "parallel"}]}}
"""Of pairs, so that a decoder-only model is one of translation."""
SOURCES = ["one two three", "four", "ten nine eight seven six", "five unheard"]
TARGETS = ["eins zwei drei", "vier", "zehn neun acht sieben sechs", "fünf unerhört"]


def config_of(settings: dict[str, Any]) -> ModelConfig:
    stack = {"depth": 2, "num_heads": 4, "ffn_dim": 20}
    sides = ("decoder",) if settings.get("kind") == "decoder_only" else ("encoder", "decoder")
    tree = {"kind": "encoder_decoder", "model_dim": 16, **settings}
    tree |= {side: stack | settings.get(side, {}) for side in sides}
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python(tree)
    return config


def make_bundle(directory: Path, settings: dict[str, Any], recipe: dict[str, Any] = RECIPE) -> BundleModel:
    """A model that learned a few pairs: its translations end, padding is improbable, and no gain is one, no bias zero."""
    config = config_of(settings)
    shared = config.kind == "decoder_only" or config.embedding.tie == "all"
    names = dictionary(NAMES + WORDS if shared else NAMES)
    pair = TokenizerPair(names, names if shared else dictionary(WORDS))
    vocabulary = VocabularySizes(source=pair.source.vocab_size, target=pair.target.vocab_size)
    model = build_model(config, vocabulary, seed=4)
    learn(model, pair)
    save_bundle(
        directory, model_config=config, vocabulary=vocabulary, weights=to_canonical(model), tokenizers=pair, recipe=recipe
    )
    return load(directory)


def learn(model: Model, pair: TokenizerPair) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    encoded = [[[*row, 2] for row in side.encode(lines)] for side, lines in ((pair.source, SOURCES), (pair.target, TARGETS))]
    examples = [tuple(np.array(row) for row in rows) for rows in zip(*encoded, strict=True)]
    batch = Collator(model.kind, pad_id=1, eos_id=2, start_id=2)(examples, np.arange(len(examples)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(40):
        hidden = model.eval()(batch.source, batch.target).hidden.flatten(0, 1)[batch.targets.index]
        loss = torch.nn.functional.cross_entropy(model.project(hidden), batch.targets.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Theirs:
    """The exported model in CTranslate2, with the answers as dstrain gives them: EOS included, ids instead of names."""

    def __init__(self, model: BundleModel, directory: Path) -> None:
        self.reads_source = model.bundle.model_config.kind == "encoder_decoder"
        reader = ctranslate2.Translator if self.reads_source else ctranslate2.Generator
        self.model = reader(str(directory), device="cpu", intra_threads=1)
        self.sources, self.targets = (
            [side.tokens(row) for row in side.encode(lines)]
            for side, lines in ((model.tokenizer.source, SOURCES), (model.tokenizer.target, TARGETS))
        )
        self.prompts = [[*source, "</s>"] for source in self.sources]

    def forced(self) -> list[list[float]]:
        """The log-probability of each target's tokens and of its end."""
        if self.reads_source:
            return [result.log_probs for result in self.model.score_batch(self.sources, self.targets)]
        texts = [[*prompt, *target, "</s>"] for prompt, target in zip(self.prompts, self.targets, strict=True)]
        results = self.model.score_batch(texts)
        return [result.log_probs[len(prompt) - 1 :] for result, prompt in zip(results, self.prompts, strict=True)]

    def search(self, beam_size: int) -> tuple[list[list[str]], list[float]]:
        """The best hypothesis of each source and its score."""
        options: dict[str, Any] = {"beam_size": beam_size, "return_scores": True, "return_end_token": True}
        if self.reads_source:
            found = self.model.translate_batch(self.sources, max_decoding_length=20, min_decoding_length=0, **options)
            return [result.hypotheses[0] for result in found], [result.scores[0] for result in found]
        # One by one: of prompts of unequal length it forces the ends step by step, with other rules for the beams.
        options |= {"max_length": 20, "include_prompt_in_result": False}
        found = [self.model.generate_batch([prompt], **options)[0] for prompt in self.prompts]
        return [result.sequences[0] for result in found], [result.scores[0] for result in found]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_and_scores(name: str, tmp_path: Path) -> None:
    model = make_bundle(tmp_path / "bundle", MODELS[name])
    export_ctranslate2(CTranslate2Export(bundle=tmp_path / "bundle", output=tmp_path / "exported"))
    theirs = Theirs(model, tmp_path / "exported")
    for ours, found in zip(model.score(SOURCES, TARGETS), theirs.forced(), strict=True):
        assert found == pytest.approx(ours.token_scores, abs=1e-4)
    for beam_size in (1, 5):
        ours = [best for best, *_ in model.generate(SOURCES, beam_size=beam_size, min_length=0, max_length_offset=20)]
        tokens, scores = theirs.search(beam_size)
        assert tokens == [model.tokenizer.target.tokens(hypothesis.tokens) for hypothesis in ours]
        assert scores == pytest.approx([hypothesis.score for hypothesis in ours], abs=1e-4)
        assert all(len(hypothesis.tokens) < 12 for hypothesis in ours)  # none is cut, which both do in their own way


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_a_start_token_by_direction_is_given_by_the_caller(kind: str, tmp_path: Path) -> None:
    """CTranslate2 knows one start token or none; with directions it has none, and the export says what to give."""
    directions = {"a-b": {"start_token": "zwei"}, "a-c": {"start_token": "acht"}, "a-d": {"source_tags": ["one"]}}
    model = make_bundle(tmp_path / "bundle", {"kind": kind}, {"data": {**RECIPE["data"], "directions": directions}})
    lines = export_ctranslate2(CTranslate2Export(bundle=tmp_path / "bundle", output=tmp_path / "exported"))
    theirs = Theirs(model, tmp_path / "exported")
    if kind == "encoder_decoder":
        assert "target_prefix, [START] for each source, is by direction: a-b zwei, a-c acht, a-d </s>" in lines
    else:
        assert (
            "ctranslate2.Generator: the prompt is TOKENS START; include_prompt_in_result=False returns what follows it" in lines
        )
        assert "START is by direction: a-b zwei, a-c acht, a-d </s>" in lines
    for direction, start in (("a-b", "zwei"), ("a-c", "acht")):
        ours = model.generate(SOURCES, direction=direction, beam_size=2, min_length=0, max_length_offset=20)
        expected = [model.tokenizer.target.tokens(best[0].tokens) for best in ours]
        options: dict[str, Any] = {"beam_size": 2, "return_end_token": True}
        if kind == "encoder_decoder":
            prefix = [[start]] * len(SOURCES)
            found = theirs.model.translate_batch(
                theirs.sources, target_prefix=prefix, max_decoding_length=20, min_decoding_length=0, **options
            )
            assert [result.hypotheses[0] for result in found] == expected
        else:
            prompts = [[*source, start] for source in theirs.sources]
            found = [
                theirs.model.generate_batch([prompt], max_length=20, include_prompt_in_result=False, **options)[0]
                for prompt in prompts
            ]
            assert [result.sequences[0] for result in found] == expected
