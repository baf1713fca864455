"""A grown bundle: old rows bit by bit, new ones their mean, old text read and answered as before; what cannot be added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dstrain.api import GrowOptions, grow, load, prepare
from dstrain.checkpoint.bundle import find_bundle, save_bundle
from dstrain.data.tokenizers.growth import entry_rows, grown_tokenizers
from dstrain.data.tokenizers.tokenizer import (
    DictionaryTokenizer,
    SentencePieceTokenizer,
    TokenizerPair,
    load_tokenizers,
    save_tokenizers,
)
from dstrain.errors import ArgumentError, DataError
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import to_canonical
from tests.equivalence.test_ctranslate2 import config_of
from tests.unit.adapters.adapted import adapt
from tests.unit.cli.verbs import Verbs
from tests.unit.data.corpus import data_config, sentences
from tests.unit.generation.small_bundle import NAMES, WORDS, dictionary, make_bundle

LINES = ["one two three", "four", "ten nine eight seven six", ""]
FACTORIZED = {"kind": "factorized", "dim": 6}
MODELS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing tied": ({}, {"source_embedding.tokens.weight", "target_embedding.tokens.weight", "projection.weight"}),
    "decoder tied": (
        {"embedding": {"kind": "plain", "tie": "decoder"}},
        {"source_embedding.tokens.weight", "target_embedding.tokens.weight"},
    ),
    "all tied": ({"embedding": {"kind": "plain", "tie": "all"}}, {"source_embedding.tokens.weight"}),
    "all tied, factorized": ({"embedding": {**FACTORIZED, "tie": "all"}}, {"source_embedding.tokens.table.weight"}),
    "narrow output": (
        {"embedding": {**FACTORIZED, "sides": "source", "output_dim": 10}},
        {"source_embedding.tokens.table.weight", "target_embedding.tokens.weight", "projection.weight"},
    ),
    "decoder-only": ({"kind": "decoder_only"}, {"target_embedding.tokens.weight", "projection.weight"}),
}


def bundle_of(directory: Path, settings: dict[str, Any]) -> Path:
    """Both sides of one vocabulary if they must be, else 17 and 16 entries."""
    config = config_of(settings)
    names = dictionary(NAMES)
    joint = config.kind == "decoder_only" or config.embedding.tie == "all"
    pair = TokenizerPair(names, names if joint else dictionary(WORDS))
    sizes = VocabularySizes.of(pair.source, pair.target)
    weights = to_canonical(build_model(config, sizes, seed=3))
    save_bundle(directory, model_config=config, vocabulary=sizes, weights=weights, tokenizers=pair, recipe=None)
    return directory


@pytest.mark.parametrize("name", MODELS)
def test_old_rows_stay_and_new_ones_are_their_mean(name: str, tmp_path: Path) -> None:
    settings, tables = MODELS[name]
    old = bundle_of(tmp_path / "old", settings)
    before, after = grow(GrowOptions(bundle=old, output=tmp_path / "new", tags=("__pl__", "__uk__"), symbols=("<mask>",)))
    assert (after.source - before.source, after.target - before.target) == (3, 3)
    one, two = (load_file(tmp_path / bundle / "model.safetensors") for bundle in ("old", "new"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.equal(two[key][: len(tensor)], tensor), key
        assert len(two[key]) == len(tensor) + 3 * (key in tables), key
        for row in two[key][len(tensor) :]:
            np.testing.assert_allclose(row, tensor.mean(0), atol=1e-6)
    small, large = load(old), load(tmp_path / "new")
    assert large.tokenizer.target.tokens(range(before.target, after.target)) == ["<mask>", "__pl__", "__uk__"]
    ids = [[5, 6, 2], [7, 2]]
    for few, many in zip(small.logits(ids, [[2, 8, 9], [2]]), large.logits(ids, [[2, 8, 9], [2]]), strict=True):
        np.testing.assert_allclose(many[:, : before.target], few, rtol=1e-5, atol=1e-6)
    answers = [[best[0].text for best in model.generate(LINES, beam_size=1)] for model in (small, large)]
    assert answers[0] == answers[1]


def test_a_sentencepiece_model_reads_old_text_as_before(tmp_path: Path) -> None:
    prepare(data_config(tmp_path), tmp_path / "data", workers=1)
    old = load_tokenizers(tmp_path / "data/tokenizer")
    long = "__" + "language" * 20 + "__"
    new = grown_tokenizers(old, tags=["__pl__", long], symbols=["<mask>"])
    assert new.shared
    assert new.source.tokens(range(old.source.vocab_size, new.source.vocab_size)) == ["<mask>", "\u2581__pl__", f"\u2581{long}"]
    texts = [*sentences(200), "__en__", "Ärger <s> \u2581 a"]
    assert new.source.encode(texts) == old.source.encode(texts)
    (row,) = new.source.encode([f"__pl__ the d<mask>og {long}"])
    assert [piece for piece in new.source.tokens(row) if "_" in piece or "<" in piece] == [
        "\u2581__pl__",
        "<mask>",
        f"\u2581{long}",
    ]
    assert new.source.decode([row]) == [f"__pl__ the d<mask>og {long}"]
    save_tokenizers(new, tmp_path / "saved")
    assert load_tokenizers(tmp_path / "saved").fingerprint == new.fingerprint != old.fingerprint
    assert entry_rows(old.source, new.source) == [*range(60), None, None, None]


def test_characters_of_a_text_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    """Of `Żółw łka` in full-width and composed forms; the rest of the text is read as before, piece by piece."""
    prepare(data_config(tmp_path), tmp_path / "data", workers=1)
    pair = load_tokenizers(tmp_path / "data/tokenizer")
    config, sizes = config_of({"embedding": {"kind": "plain", "tie": "all"}}), VocabularySizes.of(pair.source, pair.target)
    weights = to_canonical(build_model(config, sizes, seed=3))
    save_bundle(tmp_path / "old", model_config=config, vocabulary=sizes, weights=weights, tokenizers=pair, recipe=None)
    (tmp_path / "pl.txt").write_text("łzy łez\nz\u0307a the ｃat ł\n", encoding="utf-8")
    grow(GrowOptions(bundle=tmp_path / "old", output=tmp_path / "new", tags=("__pl__",), text=tmp_path / "pl.txt"))
    new = load(tmp_path / "new").tokenizer.source
    assert new.tokens(range(60, new.vocab_size)) == ["ł", "z", "y", "ż", "\u2581__pl__"]
    text = "__pl__ ła ży the ｃat"
    assert pair.source.unk_id in pair.source.encode([text])[0]
    (row,) = new.encode([text])
    assert new.unk_id not in row
    assert new.decode([row]) == ["__pl__ ła ży the cat"]
    assert new.encode(sentences(100)) == pair.source.encode(sentences(100))

    again = {"bundle": tmp_path / "new", "output": tmp_path / "again", "text": tmp_path / "pl.txt"}
    with pytest.raises(DataError, match=r"pl.txt has no character that the vocabulary lacks; add --tags or --symbols"):
        grow(GrowOptions(**again))
    grow(GrowOptions(**again, tags=("__uk__",)))
    words = make_bundle(tmp_path / "words")
    with pytest.raises(
        DataError, match="--text: a dictionary has words or pieces, not characters; name what it lacks by --symbols"
    ):
        grow(GrowOptions(bundle=words, output=tmp_path / "other", text=tmp_path / "pl.txt"))
    grow(GrowOptions(bundle=words, output=tmp_path / "other", symbols=("ł",)))


def test_specials_that_a_model_lacks_move_with_their_rows() -> None:
    """Such a model gets them after its last piece, which growth moves: rows follow names."""
    import io

    import sentencepiece

    model = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 40, "pad_id": -1, "bos_id": -1, "eos_id": -1, "unk_id": 0, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences(50)), model_writer=model, **options)
    old = SentencePieceTokenizer(model.getvalue())
    new = grown_tokenizers(TokenizerPair(old, old), tags=["__pl__"]).source
    assert (old.vocab_size, old.pad_id, old.eos_id, old.bos_id) == (43, 40, 41, 42)
    assert (new.vocab_size, new.pad_id, new.eos_id, new.bos_id) == (44, 41, 42, 43)
    assert entry_rows(old, new) == [*range(40), None, 40, 41, 42]


def test_tags_of_a_dictionary_stay_whole_before_a_model(tmp_path: Path) -> None:
    prepare(data_config(tmp_path), tmp_path / "data", workers=1)
    pieces = load_tokenizers(tmp_path / "data/tokenizer").source
    assert isinstance(pieces, SentencePieceTokenizer)
    lines = "".join(f"{piece} 1\n" for piece in pieces.tokens(range(4, 60)))
    old = DictionaryTokenizer(lines.encode(), pieces._model, tags=())
    new = grown_tokenizers(TokenizerPair(old, old), tags=["__pl__"], symbols=["<mask>"]).source
    assert isinstance(new, DictionaryTokenizer)
    assert new.tags == {"__pl__"}
    (row,) = new.encode(["__pl__ the dog"])
    assert new.tokens(row)[0] == "__pl__"
    assert row[1:] == old.encode(["the dog"])[0]


def test_a_tokenizer_with_all_entries_may_number_them_otherwise(tmp_path: Path) -> None:
    old = bundle_of(tmp_path / "old", {"embedding": {"kind": "plain", "tie": "all"}})
    words = dictionary([*NAMES[::-1], "cztery", "pięć"])
    save_tokenizers(TokenizerPair(words, words), tmp_path / "words")
    grow(GrowOptions(bundle=old, output=tmp_path / "new", tokenizer=tmp_path / "words"))
    small, large = load(old), load(tmp_path / "new")
    texts = [[best[0].text for best in model.generate(LINES, beam_size=1)] for model in (small, large)]
    assert texts[0] == texts[1]
    scores = [[h.score for h in model.score(LINES[:3], ["two one", "six", "one"])] for model in (small, large)]
    assert scores[1] != scores[0]
    np.testing.assert_allclose(scores[1], scores[0], atol=0.3)  # two entries more share the mass

    some = dictionary(NAMES[1:])
    save_tokenizers(TokenizerPair(some, some), tmp_path / "some")
    with pytest.raises(
        DataError, match=r"the new tokenizer lacks 1 of the bundle's 17 entries \('one'\); name one that has them"
    ):
        grow(GrowOptions(bundle=old, output=tmp_path / "other", tokenizer=tmp_path / "some"))
    save_tokenizers(TokenizerPair(words, dictionary(WORDS)), tmp_path / "two")
    with pytest.raises(
        DataError, match=r"has one for each side, the bundle one vocabulary for both sides; name a directory like"
    ):
        grow(GrowOptions(bundle=old, output=tmp_path / "other", tokenizer=tmp_path / "two"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"tags": ["one"]}, r"'one' is an entry of the vocabulary already; leave it out of --tags and --symbols"),
        ({"symbols": ["a b"]}, r"--symbols: 'a b' must be one or more characters without white space; choose another symbol"),
        ({"tags": ["<unk>"]}, r"--tags: '<unk>' is the name of a special"),
        ({"tags": ["x", "x"]}, r"--tags: 'x' occurs twice; choose another symbol"),
    ],
)
def test_what_cannot_be_added(words: dict[str, list[str]], message: str) -> None:
    names = dictionary(NAMES)
    with pytest.raises(DataError, match=message):
        grown_tokenizers(TokenizerPair(names, names), **words)
    grown_tokenizers(TokenizerPair(names, names), **{key: ["other"] for key in words})


def test_a_tag_that_normalization_changes(tmp_path: Path) -> None:
    prepare(data_config(tmp_path), tmp_path / "data", workers=1)
    pair = load_tokenizers(tmp_path / "data/tokenizer")
    with pytest.raises(
        DataError, match=r"--tags: '__ﬁ__' is read as \[.*, as SentencePiece normalizes text; choose one that stays"
    ):
        grown_tokenizers(pair, tags=["__ﬁ__"])
    grown_tokenizers(pair, tags=["__fi__"])


def test_names_that_occur_twice_need_their_old_ids() -> None:
    twice = DictionaryTokenizer(b"one 1\ntwo 1\none 1 #fairseq:overwrite\n")
    assert entry_rows(twice, twice.with_symbols(["three"])) == [0, 1, 2, 3, 4, 5, 6, None]
    with pytest.raises(
        DataError, match="the entry 'one' occurs twice, and the new tokenizer numbers entries otherwise; keep the old"
    ):
        entry_rows(twice, dictionary(["two", "one", "three"]))


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verbs, old, new = Verbs(capsys), make_bundle(tmp_path / "old"), tmp_path / "new"
    start = ("grow", old, "--output", new)
    assert "nothing is to be added: name entries by --tags, --symbols or --text, or a directory by --tokenizer" in verbs.fail(
        *start
    )
    both = verbs.fail(*start, "--tags", "__pl__", "--tokenizer", old / "tokenizer")
    assert "--tags, --symbols and --text name entries, --tokenizer a directory that has them: give one of both" in both
    plain = make_bundle(tmp_path / "plain", with_tokenizers=False)
    assert "has no tokenizer, so its entries have no names; import the model with one" in verbs.fail(
        "grow", plain, "--output", new, "--tags", "__pl__"
    )
    said = verbs.succeed(*start, "--tags", "__pl__", "__uk__")
    assert said == f"{old} grown: vocabulary of the source 17 -> 19 and target 16 -> 18 -> {new}\n"
    assert find_bundle(new).notes["grown_from"] == str(old)
    assert "exists; add --overwrite to replace it" in verbs.fail(*start, "--tags", "__cs__")
    verbs.succeed(*start, "--tags", "__cs__", "--overwrite")


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    base = make_bundle(tmp_path / "base")
    adapted = tmp_path / "adapted"
    adapt(adapted, base, seed=1)
    grow(GrowOptions(bundle=adapted, output=tmp_path / "new", tags=("__pl__",)))
    assert not find_bundle(tmp_path / "new").adapters
    answers = [[best[0].text for best in load(path).generate(LINES, beam_size=1)] for path in (adapted, tmp_path / "new")]
    assert answers[0] == answers[1]


def test_options_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="nothing is to be added"):
        grow(GrowOptions(bundle=tmp_path / "none", output=tmp_path / "new"))
