"""Tokens that a tokenizer does not know are counted wherever text is read, and their likely cause is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dstrain.cli.main import main
from dstrain.data.config import DataConfig, ParallelText
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.data.tokenizers.config import FairseqDictionaries
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, SentencePieceTokenizer, load_tokenizers
from dstrain.data.tokenizers.unknown import UnknownTokens, likely_cause, unreachable_tags
from tests.unit.distillation.toy_store import prepared
from tests.unit.generation.small_bundle import dictionary, make_bundle

LINES = ["a dog runs .", "the old cat sleeps .", "", "two big dogs run ."]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer directory of prepared data: a SentencePiece model."""
    return prepared(tmp_path_factory.mktemp("pieces") / "data") / "tokenizer"


def prepare_words(directory: Path, symbols: list[str], lines: list[str] = LINES) -> Path:
    """Data of the lines on both sides, read with a dictionary and no model before it."""
    (directory / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    (directory / "text").write_text("\n".join(lines) + "\n")
    corpus = ParallelText(source=str(directory / "text"), target=str(directory / "text"))
    config = DataConfig(train=(corpus,), valid=(corpus,), tokenizer=FairseqDictionaries(source=str(directory / "dict.txt")))
    prepare(config, directory / "data", workers=1, progress=False)
    return directory / "data"


def test_prepared_data_knows_its_share(tmp_path: Path) -> None:
    """Of 12 words, EOS left out, the dictionary has the full stops and the verb; the empty pair is dropped from train alone."""
    data = prepare_words(tmp_path, [".", "runs"])
    for split in load_manifest(data).splits.values():
        assert split.unknown_shares() == {"source": 10 / 14, "target": 10 / 14}
        assert [shard.source_unknown for shard in split.shards] == [10]


def test_inspect_shows_the_share_and_the_cause(tmp_path: Path, pieces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizers(pieces).source
    data = prepare_words(tmp_path, [symbol for symbol in tokenizer.tokens(range(4, 100)) if symbol != "."])
    assert main(["inspect", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "train: 3 pairs, 17 + 17 tokens; <unk> 92.86 % of source and 92.86 % of target;" in printed
    assert "warning: 92.9 % of the source tokens of train, 92.9 % of the target tokens of train, 92" in printed
    assert "the dictionary holds SentencePiece pieces, but text is split at spaces alone: name the SentencePiece model" in printed


def test_the_sentencepiece_model_that_the_warning_asks_for_ends_it(
    tmp_path: Path, pieces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizers(pieces).source
    prepare_words(tmp_path, tokenizer.tokens(range(4, tokenizer.vocab_size)))
    (model,) = pieces.glob("*.model")
    corpus = ParallelText(source=str(tmp_path / "text"), target=str(tmp_path / "text"))
    named = FairseqDictionaries(source=str(tmp_path / "dict.txt"), source_model=str(model))
    config = DataConfig(train=(corpus,), valid=(corpus,), tokenizer=named)
    prepare(config, tmp_path / "again", workers=1, progress=False)
    assert main(["inspect", str(tmp_path / "data")]) == 0
    assert "name the SentencePiece model (data.tokenizer.source_model and target_model" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "again")]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_share_of_two_percent_is_shown_without_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepare_words(tmp_path, ["known"], ["known " * 49 + "other"])
    assert main(["inspect", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "<unk> 2.00 % of source and 2.00 % of target" in printed
    assert "warning" not in printed


def test_data_of_an_earlier_version_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepare_words(tmp_path, ["dog"])
    manifest = json.loads((data / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            del shard["source_unknown"], shard["target_unknown"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", str(data)]) == 0
    assert "<unk> not counted" in capsys.readouterr().out


def test_generate_counts_its_input(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, source = make_bundle(tmp_path / "bundle"), tmp_path / "in.txt"
    caplog.set_level(logging.INFO, "dstrain")
    told = "2 of 4 tokens of the input (50.00 %) are <unk>: text is split at spaces alone"
    for text, expected in (("one two\nunheard words\n", told), ("one\n", "")):
        source.write_text(text)
        assert main(["generate", str(bundle), "--input", str(source), "--beam-size", "1", "--device", "cpu"]) == 0
        said = capsys.readouterr().err + caplog.text
        caplog.clear()
        assert expected in said
        assert ("<unk>" in said) == bool(expected)


def test_the_cause_depends_on_the_tokenizer(pieces: Path) -> None:
    model = next(pieces.glob("*.model")).read_bytes()
    causes = {
        "not trained on": SentencePieceTokenizer(model),
        "subword-nmt apply-bpe": dictionary(["hel@@", "lo"]),
        "tokenize it as the text of the dictionary": dictionary(["hello"]),
        "does not belong to the dictionary": DictionaryTokenizer(b"hello 1\n", model),
    }
    for words, tokenizer in causes.items():
        assert words in likely_cause(tokenizer)


def test_tags_that_the_model_splits_are_found(pieces: Path) -> None:
    model = next(pieces.glob("*.model")).read_bytes()
    symbols = ["<2en>", "__de__", "[ro_RO]", ">>fra<<", "eng_Latn", "dog", "<mask>", "<0x0A>"]
    content = "".join(f"{symbol} 1\n" for symbol in symbols).encode()
    assert unreachable_tags(DictionaryTokenizer(content, model)) == symbols[:5]
    assert unreachable_tags(DictionaryTokenizer(content, model, tags=symbols[:4])) == ["eng_Latn"]
    assert unreachable_tags(DictionaryTokenizer(content)) == []


def test_counts_add_up() -> None:
    count = UnknownTokens()
    assert count.share == 0
    count.add([[3, 5, 6], []], 3)
    count.add([[3]], 3)
    assert (count.tokens, count.unknown, count.share) == (4, 2, 0.5)
