"""The Python door: generate, score, logits, and what it says when something does not fit."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from dstrain.api import BundleModel, load
from dstrain.batch import Sequences
from dstrain.build.device import usable_device, usable_precision
from dstrain.engine.construction import COMPUTE_DTYPES
from dstrain.errors import BundleError, DataError, DstrainError, RecipeError
from dstrain.generation.config import BeamSearchConfig, SamplingConfig
from dstrain.generation.padding import pad
from tests.unit.generation.small_bundle import SENTENCES, WORDS, make_bundle, make_decoder_only_bundle

RECIPE = {"generation": {"kind": "beam", "beam_size": 3, "length_penalty": 0.4, "max_length_offset": 2, "num_best": 2}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("api") / "bundle", recipe=RECIPE)


@pytest.fixture(scope="module")
def model(directory: Path) -> BundleModel:
    return load(directory)


def test_every_sentence_has_hypotheses_with_text_tokens_and_scores(model: BundleModel) -> None:
    found = model.generate(SENTENCES, beam_size=5, num_best=4)
    assert len(found) == len(SENTENCES)
    for sentence, hypotheses in zip(SENTENCES, found, strict=True):
        assert len(hypotheses) == (4 if sentence.strip() else 1)
        for hypothesis in hypotheses:
            assert hypothesis.tokens[-1] == model.tokenizer.target.eos_id
            assert len(hypothesis.tokens) == len(hypothesis.token_scores)
            assert hypothesis.text == " ".join(model.tokenizer.target.tokens(hypothesis.tokens[:-1]))
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
    assert found[1][0].text == found[4][0].text == ""
    assert found[1][0].score == 0.0
    assert found[0][0].text


def test_a_sentence_means_the_same_in_every_batch(model: BundleModel) -> None:
    together = model.generate(SENTENCES, max_tokens=30)
    for sentence, hypotheses in zip(SENTENCES, together, strict=True):
        (alone,) = model.generate([sentence])
        assert [h.text for h in alone] == [h.text for h in hypotheses]
        assert [h.score for h in alone] == pytest.approx([h.score for h in hypotheses], rel=1e-5)


def test_forced_scores_equal_search_scores(model: BundleModel) -> None:
    """The search goes step by step with a cache, the forced score is one pass over whole sequences."""
    sentences = [sentence for sentence in SENTENCES if sentence.strip()]
    for hypotheses in zip(*model.generate(sentences, beam_size=4, num_best=3), strict=True):
        scored = model.score(sentences, [h.text for h in hypotheses])
        for searched, forced in zip(hypotheses, scored, strict=True):
            if all(token > 3 for token in searched.tokens[:-1]):
                assert forced.tokens == searched.tokens
                assert forced.score == pytest.approx(searched.score, rel=1e-5)
                assert forced.token_scores == pytest.approx(searched.token_scores, rel=1e-4, abs=1e-5)


def test_scores_follow_the_length_penalty(model: BundleModel) -> None:
    (normalized,) = model.score(["one two"], ["eins zwei drei"], length_penalty=1.0)
    (total,) = model.score(["one two"], ["eins zwei drei"], length_penalty=0.0)
    assert normalized.score == pytest.approx(total.score / 4, rel=1e-6)
    assert total.score == pytest.approx(sum(total.token_scores), rel=1e-6)


def test_a_score_is_a_bare_sum_on_request(model: BundleModel) -> None:
    (normalized,) = model.generate(["one two three"], length_penalty=1.0)[0][:1]
    (found,) = model.generate(["one two three"], score="sum")[0][:1]
    assert found.score == pytest.approx(sum(found.token_scores), rel=1e-5)
    assert normalized.score == pytest.approx(sum(normalized.token_scores) / len(normalized.tokens), rel=1e-5)
    (forced,) = model.score(["one two"], ["eins zwei drei"], score="sum")
    assert forced.score == pytest.approx(sum(forced.token_scores), rel=1e-6)


@pytest.mark.parametrize("kind", ["beam", "sampling"])
def test_hypotheses_begin_with_their_prefix(model: BundleModel, kind: Literal["beam", "sampling"]) -> None:
    prefixes = ["zwölf elf", "neun", "", "eins eins eins", "", "acht", ""]
    free = model.generate(SENTENCES, kind=kind)
    for prefix, without, hypotheses in zip(prefixes, free, model.generate(SENTENCES, kind=kind, prefixes=prefixes), strict=True):
        if prefix:
            assert [h.text.split()[: len(prefix.split())] for h in hypotheses] == [prefix.split()] * 2
        else:
            assert [h.text for h in hypotheses] == [h.text for h in without]


def test_prefixes_that_do_not_fit_are_refused(model: BundleModel) -> None:
    with pytest.raises(DataError, match=r"prefix line 2 has 17 tokens .* reads at most 16"):
        model.generate(["one", "two"], prefixes=["", "eins " * 16])


def test_logits_are_those_of_the_model_without_padding(model: BundleModel) -> None:
    sources = [[5, 6, 7, 2], [8, 2], [9, 10, 11, 12, 13, 14, 2]]
    inputs = [[2, 4], [2, 5, 6, 7, 8], [2]]
    found = model.logits(sources, inputs)
    for source, row, logits in zip(sources, inputs, found, strict=True):
        assert logits.dtype == np.float32
        assert logits.shape == (len(row), len(WORDS) + 4)
        with torch.no_grad():
            output = model.bundle.model(Sequences(*pad([source], 1)), Sequences(*pad([row], 1)))
            expected = model.bundle.model.project(output.hidden)[0].numpy()
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_recipe_in_the_bundle_gives_the_defaults(model: BundleModel) -> None:
    config = model.generation_config({})
    assert isinstance(config, BeamSearchConfig)
    assert (config.beam_size, config.length_penalty, config.num_best) == (3, 0.4, 2)
    assert model.generation_config({"beam_size": 7, "seed": None}).num_best == 2
    assert len(model.generate(["one"])[0]) == 2


def test_sampling_keeps_what_both_methods_share(model: BundleModel) -> None:
    config = model.generation_config({"kind": "sampling", "top_k": 4})
    assert isinstance(config, SamplingConfig)
    assert (config.top_k, config.length_penalty, config.num_best) == (4, 0.4, 2)
    one, same, other = (model.generate(["one two three"], kind="sampling", num_best=4, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_without_a_recipe_the_configuration_has_its_own_defaults(tmp_path: Path) -> None:
    model = load(make_bundle(tmp_path / "bundle"))
    assert model.generation_config({}) == BeamSearchConfig()


def test_every_option_of_both_methods_can_be_given(model: BundleModel) -> None:
    fields = BeamSearchConfig.model_fields.keys() | SamplingConfig.model_fields.keys()
    assert fields <= set(inspect.signature(model.generate).parameters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size: input should be greater than 0, not 0"),
        ({"num_best": 9, "beam_size": 4}, "num_best = 9 exceeds beam_size = 4; raise beam_size"),
        ({"top_k": 5}, "top_k (--top-k) has no effect in beam search"),
        ({"kind": "sampling", "beam_size": 5}, "beam_size (--beam-size) has no effect in sampling"),
        ({"kind": "sampling", "top_p": 1.5}, "top_p: input should be less than or equal to 1, not 1.5"),
    ],
)
def test_a_wrong_option_is_explained(model: BundleModel, options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match="generation options: ") as caught:
        model.generate(["one"], **options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_long_sentence_is_refused_or_cut(model: BundleModel) -> None:
    long = " ".join(["one"] * 40)
    with pytest.raises(DataError, match=r"source line 2 has 41 tokens .* reads at most 16"):
        model.generate(["two", long])
    cut = model.generate([long], truncate_source=True)
    assert cut[0][0].text == model.generate([" ".join(["one"] * 15)])[0][0].text
    with pytest.raises(DataError, match=r"target line 1 has 41 tokens"):
        model.score(["one"], [long])


def test_a_bundle_without_tokenizer_still_gives_logits(tmp_path: Path) -> None:
    model = load(make_bundle(tmp_path / "bundle", with_tokenizers=False))
    assert model.logits([[5, 2]], [[2, 4]])[0].shape == (2, 16)
    with pytest.raises(BundleError, match="has no tokenizer, so it reads no text"):
        model.generate(["one"])


def test_a_device_that_is_not_there_is_named(directory: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DstrainError, match="device cuda: no GPU is visible here; use cpu or auto"):
        load(directory, device="cuda")
    assert load(directory, device="auto").device == "cpu"


@pytest.mark.parametrize("device", ["foo", "cuda:", "cpu:1", "gpu"])
def test_an_unknown_device_is_refused(directory: Path, device: str) -> None:
    with pytest.raises(DstrainError, match=f"device '{device}' is unknown; choose cpu, cuda, cuda:N or auto"):
        load(directory, device=device)


def test_a_gpu_beyond_those_visible_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [usable_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(DstrainError, match="device cuda:2: 2 GPUs are visible here, numbered from 0"):
        usable_device("cuda:2")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_model_computes_in_the_precision_asked_for(
    directory: Path, model: BundleModel, precision: Literal["bf16", "fp16"]
) -> None:
    half = load(directory, precision=precision)
    assert (model.precision, half.precision) == ("fp32", precision)
    sources, targets = ["one two", "three"], ["eins zwei drei", "vier"]
    assert {parameter.dtype for parameter in half.bundle.model.parameters()} == {COMPUTE_DTYPES[precision]}
    exact, near = ([h.score for h in loaded.score(sources, targets)] for loaded in (model, half))
    assert near != exact
    assert near == pytest.approx(exact, rel=0.03)
    assert half.logits([[5, 2]], [[2, 4]])[0].dtype == np.float32
    assert all(hypotheses[0].text for hypotheses in half.generate(sources))


def test_the_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, supported=supported: supported)
        assert usable_precision("auto", "cuda:1") == ("bf16" if supported else "fp32")
        assert usable_precision("auto", torch.device("cpu")) == "fp32"
        assert usable_precision("fp16", "cuda") == "fp16"
    with pytest.raises(DstrainError, match="precision 'fp8' is unknown; choose auto, fp32, bf16, fp16"):
        usable_precision("fp8", "cpu")  # type: ignore[arg-type]


def test_nothing_that_is_no_bundle_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        load(tmp_path)


@pytest.mark.parametrize("trained_on", ["text", "fairseq_text", None])
def test_a_language_model_goes_on_from_a_line(trained_on: str | None, tmp_path: Path) -> None:
    model = load(make_decoder_only_bundle(tmp_path / "bundle", trained_on=trained_on))
    assert model.continues
    lines = ["eins zwei drei", "", "vier"]
    found = [h.text for (h,) in model.generate(lines, min_length=6, max_length_ratio=1, max_length_offset=5)]
    assert [text.startswith(line) for text, line in zip(found, lines, strict=True)] == [True] * 3
    assert [len(text.split()) > len(line.split()) for text, line in zip(found, lines, strict=True)] == [True, False, True]
    (prefixed,) = model.generate([""], prefixes=["eins zwei drei"], min_length=6, max_length_ratio=1, max_length_offset=5)
    assert prefixed[0].text == found[0]
    with pytest.raises(DataError, match=r"line 2 \('zwei'\) and its prefix: a language model continues one text"):
        model.generate(["eins", "zwei"], prefixes=["", "drei"])


def test_a_language_model_scores_whole_texts(tmp_path: Path) -> None:
    model = load(make_decoder_only_bundle(tmp_path / "bundle", trained_on="text"))
    (scored,) = model.score([""], ["eins zwei"], score="sum")
    (logits,) = model.logits(None, [[2, *model.tokenizer.target.encode(["eins zwei"])[0]]])
    log_probs = torch.from_numpy(logits).log_softmax(-1)
    assert scored.score == pytest.approx(sum(float(log_probs[i, token]) for i, token in enumerate(scored.tokens)), rel=1e-5)
    with pytest.raises(DataError, match=r"source line 1 \('eins'\): a language model scores whole texts"):
        model.score(["eins"], ["zwei"])


def test_a_decoder_only_model_of_pairs_reads_a_line_as_the_source(tmp_path: Path) -> None:
    model = load(make_decoder_only_bundle(tmp_path / "bundle", trained_on="parallel"))
    assert not model.continues
    sources = ["eins zwei drei", "vier"]
    found = model.generate(sources, min_length=3, beam_size=3)
    assert not found[0][0].text.startswith(sources[0])
    scored = model.score(sources, [h.text for (h,) in found])
    assert [h.score for h in scored] == pytest.approx([h.score for (h,) in found], rel=1e-5)
    with pytest.raises(DataError, match=r"target line 1 has 15 tokens .* reads at most 13"):
        model.score(["eins zwei drei"], [" ".join(["eins"] * 14)])
