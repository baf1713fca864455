"""Multilingual checkpoints: symbols appended at load time, markers around text, one direction of several.

What each task does is written down here once more, as ids, from fairseq's own order: source, decoder start, forced tokens, end.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dstrain.api import load
from dstrain.batch import Sequences
from dstrain.build.bundle_model import BundleModel
from dstrain.build.same_data import require_data_of
from dstrain.build.training_data import TrainingData
from dstrain.checkpoint.bundle import find_bundle
from dstrain.data.prepared.prepare import prepare
from dstrain.data.tokenizers.dictionary_file import Markers
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, load_tokenizers
from dstrain.errors import DataError, ImportFormatError
from dstrain.interop.fairseq.checkpoint import FairseqCheckpoint, read_dictionaries, read_fairseq_checkpoint
from dstrain.interop.fairseq.importing import FairseqImport, import_checkpoint
from dstrain.interop.fairseq.languages import language_tokens
from dstrain.recipe_file import load_recipe
from tests.unit.interop.fairseq_checkpoints import AbsentModules, dictionaries, small_weights
from tests.unit.training.fakes import ONE_RANK

BOS, PAD, EOS = 0, 1, 2
WORDS = [4, 6, 5]
"""Ids of LINE."""
LINE = "word0 word2 word1"
EN, DE, FR, MASK = 9, 10, 11, 12
"""Ids of the symbols that follow five words."""
MULTI = {"_name": "translation_multi_simple_epoch", "langs": ["en", "de", "fr"], "lang_pairs": "en-de,de-fr"}
MBART = {"_name": "translation_from_pretrained_bart", "langs": "en,de,fr"}
OLD_MULTI = {"_name": "multilingual_translation", "lang_pairs": "en-de,de-fr,fr-en"}
LANGUAGES = ["__en__", "__de__", "__fr__"]
BRACKETS = ["[en]", "[de]", "[fr]"]
BY_NAME = ["__de__", "__en__", "__fr__"]
Ids = list[int]
CASES: dict[str, tuple[dict[str, Any], list[str], Ids, int, Ids, int]] = {
    # settings -> symbols, source ids, first decoder input, forced target ids, the id that ends a target
    "source token": ({**MULTI, "encoder_langtok": "src"}, LANGUAGES, [EN, *WORDS, EOS], EOS, [], EOS),
    "both": ({**MULTI, "encoder_langtok": "src", "decoder_langtok": True}, LANGUAGES, [EN, *WORDS, EOS], EOS, [DE], EOS),
    "target first": ({**MULTI, "encoder_langtok": "tgt"}, LANGUAGES, [DE, *WORDS, EOS], EOS, [], EOS),
    "langtoks": ({**MULTI, "langtoks": {"main": ("tgt", "tgt")}}, LANGUAGES, [DE, *WORDS, EOS], EOS, [DE], EOS),
    "replacing": (
        {**MULTI, "encoder_langtok": "src", "decoder_langtok": True, "lang_tok_replacing_bos_eos": True},
        LANGUAGES,
        [*WORDS, EN],
        DE,
        [],
        EOS,
    ),
    "mbart style": (
        {**MULTI, "lang_tok_style": "mbart", "encoder_langtok": "src", "decoder_langtok": True},
        [*BRACKETS, "<mask>"],
        [EN, *WORDS, EOS],
        EOS,
        [DE],
        EOS,
    ),
    "mbart": (MBART, [*BRACKETS, "<mask>"], [*WORDS, EOS, EN], DE, [], DE),
    "mbart with bos": ({**MBART, "prepend_bos": True}, [*BRACKETS, "<mask>"], [BOS, *WORDS, EOS, EN], DE, [BOS], DE),
    "old": ({**OLD_MULTI, "encoder_langtok": "tgt", "decoder_langtok": True}, BY_NAME, [*WORDS, 9], 9, [], EOS),
    "old, plain": (OLD_MULTI, [], [*WORDS, EOS], EOS, [], EOS),
    "denoising": ({"_name": "denoising"}, ["<mask>"], [BOS, *WORDS, EOS], EOS, [BOS], EOS),
    "denoising with languages": (
        {"_name": "multilingual_denoising", "langs": "en,de,fr", "add_lang_token": True},
        [*BRACKETS, "<mask>"],
        [BOS, *WORDS, EOS, EN],
        DE,
        [BOS],
        DE,
    ),
}


def greedy(loaded: BundleModel, source: Ids, start: int, forced: Ids, end: int, *, most: int = 12) -> tuple[Ids, list[float]]:
    """The best token at each step and its log-probability, without any of dstrain's search."""
    model, tokens, scores = loaded.bundle.model, [start], []
    while len(tokens) <= most and (len(tokens) == 1 or tokens[-1] != end):
        sides = [Sequences(torch.tensor([row]), torch.tensor([len(row)])) for row in (source, tokens)]
        with torch.no_grad():
            log_probs = model.project(model(*sides).hidden[0, -1]).log_softmax(-1)
        allowed = forced[len(tokens) - 1 : len(tokens)] or [token for token in range(len(log_probs)) if token != PAD]
        best = end if len(tokens) == most else max(allowed, key=lambda token: float(log_probs[token]))
        scores.append(float(log_probs[best]))
        tokens.append(best)
    return tokens[1:], scores


@pytest.mark.parametrize("case", CASES)
def test_a_task_imports_and_translates_as_fairseq_would(case: str, tmp_path: Path, modules: AbsentModules) -> None:
    task, symbols, source, start, forced, end = CASES[case]
    torch.manual_seed(len(case))
    rows = 9 + len(symbols)
    path = modules.new_checkpoint(
        tmp_path / "checkpoint.pt",
        small_weights(source=rows, target=rows),
        {**task, "source_lang": "en", "target_lang": "de"},
        omegaconf=case == "both",
    )
    lines = import_checkpoint(FairseqImport(path, tmp_path / "b", dictionaries(tmp_path / "dictionaries", 9, 9)))
    assert any(f"vocabularies {rows} and {rows}" in line for line in lines)
    loaded = load(tmp_path / "b")
    tokenizers = loaded.tokenizer
    assert tokenizers.source.tokens(range(9, rows)) == symbols
    assert [*tokenizers.source.encode([LINE])[0], tokenizers.source.eos_id] == source
    expected, scores = greedy(loaded, source, start, forced, end)
    found = loaded.generate([LINE, ""], kind="beam", beam_size=1, max_length_offset=11, max_length_ratio=0.0)
    assert found[0][0].tokens == expected
    assert found[0][0].token_scores == pytest.approx(scores, rel=1e-4, abs=1e-5)
    hidden = {BOS, PAD, EOS, *forced, start, end}
    assert found[0][0].text == " ".join(tokenizers.target.tokens([token for token in expected if token not in hidden]))
    assert found[1][0].text == "", "an empty line has no tokens, and an empty answer"
    prefixed = loaded.generate([LINE], prefixes=["word4"], kind="beam", beam_size=1, max_length_offset=5)[0][0]
    assert prefixed.tokens[: len(forced) + 1] == [*forced, 8]
    scored = loaded.score([LINE], [LINE], score="sum")[0]
    target = [*forced, *WORDS, *([EOS] if end == DE else []), end]
    assert scored.tokens == target
    assert scored.token_scores == pytest.approx(greedy(loaded, source, start, target, end)[1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", ["replacing", "mbart", "mbart with bos", "both"])
def test_training_an_imported_model_further_reads_what_fairseq_read(case: str, tmp_path: Path, modules: AbsentModules) -> None:
    task, symbols, source, start, forced, end = CASES[case]
    rows = 9 + len(symbols)
    named = {**task, "source_lang": "en", "target_lang": "de"}
    path = modules.new_checkpoint(tmp_path / "checkpoint.pt", small_weights(source=rows, target=rows), named)
    import_checkpoint(FairseqImport(path, tmp_path / "b", dictionaries(tmp_path, 9, 9)))
    tree = yaml.safe_load((tmp_path / "b" / "recipe.yaml").read_text())
    (tmp_path / "PAIRS.tsv").write_text(f"{LINE}\t{LINE}\n")
    tree["data"]["train"] = tree["data"]["valid"] = [{"kind": "tsv", "path": str(tmp_path / "PAIRS.tsv")}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    prepare(recipe.data, tmp_path / "data", workers=1)
    data = TrainingData(tmp_path / "data", recipe)
    require_data_of(recipe, data.directory, data.manifest)
    assert data.vocabulary == find_bundle(tmp_path / "b").description.vocabulary
    batch = data.collator("train", recipe, ONE_RANK)([(data.train[0].source, data.train[0].target)], np.array([0]))
    assert batch.reading.tokens.tolist() == [source]
    after = [EOS] if case.startswith("mbart") else []
    assert batch.targets.labels.tolist() == [*forced, *WORDS, *after, end]
    assert batch.target.tokens.tolist() == [[start, *forced, *WORDS, *after]]


def test_a_direction_is_chosen_by_pair(tmp_path: Path, modules: AbsentModules) -> None:
    task = {**MULTI, "encoder_langtok": "src", "decoder_langtok": True}
    path = modules.new_checkpoint(tmp_path / "checkpoint.pt", small_weights(source=12, target=12), task)
    folder = dictionaries(tmp_path, 9, 9, ("de", "fr"))
    with pytest.raises(ImportFormatError, match=r"has many directions \(en-de, de-fr\), .*choose with --pair en-de"):
        import_checkpoint(FairseqImport(path, tmp_path / "b", folder))
    with pytest.raises(ImportFormatError, match="has no language nl, only en, de, fr"):
        import_checkpoint(FairseqImport(path, tmp_path / "b", folder, pair="de-nl"))
    with pytest.raises(ImportFormatError, match="--pair de is not SOURCE-TARGET"):
        import_checkpoint(FairseqImport(path, tmp_path / "b", folder, pair="de"))
    lines = import_checkpoint(FairseqImport(path, tmp_path / "b", folder, pair="de-fr"))
    assert "target fr: __fr__ text </s>; the decoder reads </s> first" in lines
    pair = load_tokenizers(tmp_path / "b" / "tokenizer")
    assert isinstance(pair.source, DictionaryTokenizer)
    assert isinstance(pair.target, DictionaryTokenizer)
    assert (pair.source.markers, pair.target.markers) == (Markers(before=("__de__",)), Markers(before=("__fr__",)))
    assert not pair.shared
    assert find_bundle(tmp_path / "b").description.vocabulary.start_id is None


def test_a_model_for_each_pair(tmp_path: Path, modules: AbsentModules) -> None:
    pairs = {name: small_weights(source=9, target=9) for name in ("de-en", "fr-en")}
    weights = {f"models.{pair}.{name}": tensor for pair, part in pairs.items() for name, tensor in part.items()}
    path = modules.new_checkpoint(tmp_path / "checkpoint.pt", weights, OLD_MULTI)
    with pytest.raises(ImportFormatError, match="a model for each of de-en, fr-en; choose one with --pair de-en"):
        read_fairseq_checkpoint(path)
    with pytest.raises(ImportFormatError, match="--pair en-de: the checkpoint holds models for de-en, fr-en"):
        read_fairseq_checkpoint(path, "en-de")
    lines = import_checkpoint(FairseqImport(path, tmp_path / "b", dictionaries(tmp_path, 9, 9, ("fr", "en")), pair="fr-en"))
    assert "left out models.de-en.*: another direction: --pair de-en" in lines
    table = find_bundle(tmp_path / "b").read("projection.weight")
    assert torch.equal(table, pairs["fr-en"]["decoder.output_projection.weight"])


def test_a_bilingual_model_has_its_own_direction(tmp_path: Path, modules: AbsentModules) -> None:
    task = {"_name": "translation", "source_lang": "en", "target_lang": "de"}
    path = modules.new_checkpoint(tmp_path / "checkpoint.pt", small_weights(), task)
    assert read_fairseq_checkpoint(path, "en-de").task["target_lang"] == "de"
    with pytest.raises(ImportFormatError, match=r"--pair de-en: .* task translation has one direction, en-de; leave it out"):
        read_fairseq_checkpoint(path, "de-en")
    assert read_fairseq_checkpoint(path).task["target_lang"] == "de"


@pytest.mark.parametrize(
    ("task", "symbols"),
    [
        ({**MULTI, "langtoks_specs": "main,mono_dae", "extra_data": {"mono_dae": "x"}}, [*LANGUAGES, "__en_dae__", "__de_dae__"]),
        ({**MULTI, "langs": "fr,en,de", "add_data_source_prefix_tags": True}, ["__fr__", "__en__", "__de__", "<MINED_DATA>"]),
        ({**MULTI, "langs": None}, BY_NAME),
        ({**MULTI, "langs": None, "lang_dict": "elsewhere/languages.txt"}, ["__de__", "__en__"]),
    ],
)
def test_the_order_of_appended_symbols(task: dict[str, Any], symbols: list[str], tmp_path: Path) -> None:
    (tmp_path / "languages.txt").write_text("de\nen\n")
    added = language_tokens({**task, "source_lang": "en", "target_lang": "de"}, tmp_path)
    assert list(added.symbols[: len(symbols)]) == symbols
    assert added.symbols[-1] == ("<mask>" if "extra_data" in task else added.symbols[-1])


def test_a_language_model_reads_the_token_that_its_task_adds_first(tmp_path: Path) -> None:
    found = FairseqCheckpoint({}, {"_name": "language_modeling", "add_bos_token": True}, {})
    dictionaries(tmp_path, 9, 9)
    (tmp_path / "dict.en.txt").rename(tmp_path / "dict.txt")
    pair = read_dictionaries(tmp_path, found)
    assert pair.shared
    assert (pair.target.start_id, pair.target.eos_id, pair.target.vocab_size) == (BOS, EOS, 9)


def test_a_file_of_languages_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "languages.txt").write_bytes(b"de\xff\n")
    with pytest.raises(DataError, match=r"languages\.txt:1: invalid UTF-8"):
        language_tokens({**MULTI, "langs": None, "lang_dict": "languages.txt"}, tmp_path)


def test_symbols_that_a_dictionary_has_are_not_appended_again(tmp_path: Path) -> None:
    (tmp_path / "model_dict.txt").write_text("word0 1\n__de__ 1\nword1 1")
    task = {
        **MULTI,
        "encoder_langtok": "src",
        "fixed_dictionary": "/far/model_dict.txt",
        "source_lang": "de",
        "target_lang": "fr",
    }
    source = read_dictionaries(tmp_path, FairseqCheckpoint({}, task, {})).source
    assert source.tokens(range(4, source.vocab_size)) == ["word0", "__de__", "word1", "__en__", "__fr__"]
    assert source.encode(["word1"]) == [[5, 6]]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"_name": "translation"}, "the dictionary has 9 entries with the four specials; give the dictionaries"),
        (
            {**MULTI, "langs": "en,de"},
            "has 11 entries with the four specials and what task translation_multi_simple_epoch app",
        ),
        ({"_name": "my_plug_in"}, "four specials; its task my_plug_in may append symbols, which dstrain does not know; give"),
        ({**MULTI, "langs": None, "lang_pairs": None}, "it names neither langs nor lang_dict nor lang_pairs"),
        ({**MULTI, "langs": None, "lang_dict": "gone.txt"}, r"lang_dict = gone\.txt, which is not here; copy it into"),
    ],
)
def test_tables_that_do_not_fit_are_refused_for_their_reason(
    task: dict[str, Any], message: str, tmp_path: Path, modules: AbsentModules
) -> None:
    named = {**task, "source_lang": "en", "target_lang": "de"}
    path = modules.new_checkpoint(tmp_path / "checkpoint.pt", small_weights(source=12, target=12), named)
    with pytest.raises(ImportFormatError, match=message):
        import_checkpoint(FairseqImport(path, tmp_path / "b", dictionaries(tmp_path, 9, 9)))
