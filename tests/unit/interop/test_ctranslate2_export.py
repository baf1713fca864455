"""`dstrain export --format ctranslate2`: what it refuses by name, what it says, and what it writes over."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dstrain.api import load
from dstrain.checkpoint.bundle import find_bundle, save_bundle
from dstrain.data.tokenizers.dictionary_file import Markers
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, TokenizerPair, load_tokenizers
from dstrain.errors import ExportError
from dstrain.interop.ctranslate2.check import largest_difference
from dstrain.interop.ctranslate2.export import export_ctranslate2
from dstrain.interop.ctranslate2.limits import unsupported
from dstrain.interop.ctranslate2.options import QUANTIZATIONS, CTranslate2Export
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import to_canonical
from tests.equivalence.test_ctranslate2 import config_of
from tests.paths import ROOT
from tests.unit.cli.test_moved_base import adapt
from tests.unit.cli.verbs import Verbs, bundle_for
from tests.unit.distillation.toy_store import prepared
from tests.unit.generation.small_bundle import NAMES, WORDS, dictionary, make_bundle

ctranslate2 = pytest.importorskip("ctranslate2")

BUNDLE = ROOT / "tests" / "golden" / "tiny_bundle"
EXPORT = ("export", BUNDLE, "--format", "ctranslate2", "--output")
ROTARY = {"kind": "rotary", "scaling": {"kind": "dynamic_ntk", "original_length": 8}}


@pytest.fixture
def verbs(capsys: pytest.CaptureFixture[str]) -> Verbs:
    return Verbs(capsys)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"activation": "linear"}, "model.activation = linear (it has relu, gelu, gelu_tanh, silu, tanh)"),
        ({"decoder": {"output_activation": "tanh"}}, "model.decoder.output_activation = tanh (its output layer is linear)"),
        ({"position": ROTARY}, "model.position.scaling.kind = dynamic_ntk"),
        (
            {"position": ROTARY | {"scaling": {"kind": "dynamic_yarn", "original_length": 8}}},
            "model.position.scaling.kind = dynamic_yarn",
        ),
        ({"position": {"kind": "alibi"}}, "model.position.kind = alibi with encoder = symmetric (its encoder has no ALiBi)"),
    ],
)
def test_what_it_cannot_represent_has_a_name(settings: dict[str, Any], named: str) -> None:
    (problem,) = unsupported(config_of(settings))
    assert problem.startswith(named)


def test_a_refused_model_leaves_nothing(tmp_path: Path, verbs: Verbs) -> None:
    save(tmp_path / "b", TokenizerPair(dictionary(NAMES), dictionary(WORDS)), {"activation": "linear", "position": ROTARY})
    message = verbs.fail("export", tmp_path / "b", "--format", "ctranslate2", "--output", tmp_path / "out")
    assert "CTranslate2 cannot represent model.activation = linear" in message
    assert "; model.position.scaling.kind = dynamic_ntk" in message
    assert "b runs by `dstrain generate`" in message
    assert not (tmp_path / "out").exists()


def save(directory: Path, pair: TokenizerPair, settings: dict[str, Any]) -> Path:
    config, sizes = config_of(settings), VocabularySizes.of(pair.source, pair.target)
    weights = to_canonical(build_model(config, sizes, seed=1))
    save_bundle(directory, model_config=config, vocabulary=sizes, weights=weights, tokenizers=pair, recipe=None)
    return directory


def test_it_has_the_tokenizer_and_translates_after_quantization(tmp_path: Path, verbs: Verbs) -> None:
    output = tmp_path / "exported"
    written, checked, usage, limits = verbs.succeed(*EXPORT, output, "--quantization", "int8").splitlines()
    assert written == f"{BUNDLE} -> {output}: TransformerSpec, int8"
    assert usage == "ctranslate2.Translator: the source is TOKENS"
    assert limits.startswith("the model reads 64 source and 64 target tokens; a call cuts them at max_input_length = 1024 and")
    difference = re.fullmatch(r"checked: log-probabilities of random tokens differ by up to (\S+) nats", checked)
    # Without VNNI a processor saturates sums of two products of 8 bits: the bound is one of the weights, computed in float32.
    assert difference and float(difference[1]) > 1e-4
    stored = find_bundle(BUNDLE)
    in_float32 = SimpleNamespace(Translator=partial(ctranslate2.Translator, compute_type="float32"))
    assert 1e-4 < largest_difference(in_float32, output, stored, stored.tokenizers(), {}) < 1
    pair = load_tokenizers(output / "tokenizer")
    assert pair.fingerprint == load_tokenizers(BUNDLE / "tokenizer").fingerprint
    expected = json.loads((ROOT / "tests/golden/tiny_bundle.json").read_text())
    model = ctranslate2.Translator(str(output), device="cpu", compute_type="int8", intra_threads=1)
    sources = [pair.source.tokens(row) for row in pair.source.encode(expected["source"])]
    found = [" ".join(result.hypotheses[0]) for result in model.translate_batch(sources, beam_size=4)]
    assert found == expected["translations"]


def test_a_model_that_scores_otherwise_there_is_not_written(
    tmp_path: Path, verbs: Verbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstrain.interop.ctranslate2.model.sinusoids", torch.zeros)
    assert re.search(r"tiny_bundle otherwise, by up to \S+ nats, so nothing is written", verbs.fail(*EXPORT, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_merged_first(tmp_path: Path, verbs: Verbs) -> None:
    base = bundle_for(prepared(tmp_path / "data"), tmp_path / "base", seed=3)
    adapted = adapt(tmp_path / "adapted", base, seed=1)
    words = ("--format", "ctranslate2", "--output")
    assert "adapters: 1, merged" in verbs.succeed("export", adapted, *words, tmp_path / "one").splitlines()
    verbs.succeed("merge", adapted, "--output", tmp_path / "merged")
    verbs.succeed("export", tmp_path / "merged", *words, tmp_path / "two")
    verbs.succeed("export", base, *words, tmp_path / "three")
    one, two, three = ((tmp_path / name / "model.bin").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_the_limits_are_those_of_ctranslate2() -> None:
    calls = {"translate_batch": ("max_input_length: int = 1024", "max_decoding_length: int = 256")}
    for name, limits in calls.items():
        assert all(limit in getattr(ctranslate2.Translator, name).__doc__ for limit in limits)
    assert "max_length: int = 512" in ctranslate2.Generator.generate_batch.__doc__


def test_the_types_are_those_of_ctranslate2() -> None:
    from ctranslate2.specs.model_spec import ACCEPTED_MODEL_TYPES

    assert QUANTIZATIONS == ACCEPTED_MODEL_TYPES


def test_it_replaces_its_own_kind_on_request_only(tmp_path: Path, verbs: Verbs) -> None:
    output = tmp_path / "exported"
    verbs.succeed(*EXPORT, output)
    assert "exported exists; add --overwrite to replace it" in verbs.fail(*EXPORT, output)
    verbs.succeed(*EXPORT, output, "--overwrite")
    (output / "model.bin").unlink()
    assert "is not a CTranslate2 model, so it is not replaced" in verbs.fail(*EXPORT, output, "--overwrite")
    assert "is not a CTranslate2 model" in verbs.fail(*EXPORT, BUNDLE, "--overwrite")


def test_without_its_package_there_is_one_message(tmp_path: Path, verbs: Verbs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    message = verbs.fail(*EXPORT, tmp_path / "exported")
    assert "export to CTranslate2 needs a package that cannot be imported" in message
    assert 'pip install "dstrain[ctranslate2]"' in message
    assert not (tmp_path / "exported").exists()


def test_a_bundle_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    options = CTranslate2Export(bundle=make_bundle(tmp_path / "b", with_tokenizers=False), output=tmp_path / "out")
    with pytest.raises(ExportError, match="b has no tokenizer, and CTranslate2 knows entries by name; import it with one"):
        export_ctranslate2(options)


def test_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = DictionaryTokenizer(b"a 1\nb 1\na 1 #fairseq:overwrite\n")
    options = CTranslate2Export(bundle=save(tmp_path / "b", TokenizerPair(twice, twice), {}), output=tmp_path / "out")
    with pytest.raises(ExportError, match="the target vocabulary has the entry 'a' twice, as ids 4 and 6; CTranslate2 knows"):
        export_ctranslate2(options)


def test_language_markers_are_told(tmp_path: Path) -> None:
    """Each side ends in its own language token, the decoder starts with another one."""
    words = dictionary([*WORDS, "[de]", "[en]", "<go>"])
    pair = TokenizerPair(
        words.with_symbols([], markers=Markers(after=("</s>",), end="[en]")),
        words.with_symbols([], markers=Markers(before=("[de]",), end="</s>", start="<go>")),
    )
    output = tmp_path / "exported"
    lines = export_ctranslate2(CTranslate2Export(bundle=save(tmp_path / "b", pair, {}), output=output))
    assert lines[2] == "ctranslate2.Translator: the source is TOKENS with its end"
    assert lines[4:] == [
        "source: TOKENS </s> [en]",
        "target: [de] TOKENS (give the first ones as target_prefix)",
    ]
    config = json.loads((output / "config.json").read_text())
    assert (config["decoder_start_token"], config["eos_token"], config["add_source_eos"]) == ("<go>", "</s>", False)
    model = ctranslate2.Translator(str(output), device="cpu", intra_threads=1)
    (result,) = model.score_batch([["eins", "zwei", "</s>", "[en]"]], [["[de]", "drei"]])
    (ours,) = load(tmp_path / "b").score(["eins zwei"], ["drei"])
    assert result.log_probs == pytest.approx(ours.token_scores, abs=1e-4)
