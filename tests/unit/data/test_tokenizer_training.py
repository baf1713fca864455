from pathlib import Path
from typing import Any

import pytest

from dstrain.data.config import DataConfig
from dstrain.data.sources.corpora import splits_of
from dstrain.data.tokenizers.config import TrainedSentencePiece
from dstrain.data.tokenizers.tokenizer import (
    DictionaryTokenizer,
    SentencePieceTokenizer,
    TokenizerPair,
    load_tokenizers,
    save_tokenizers,
)
from dstrain.data.tokenizers.training import TokenizerTrainer, load_configured_tokenizers, train_sentencepiece
from dstrain.errors import DataError
from tests.unit.data.corpus import data_config, parallel, sentences, write_lines


def options(**changes: Any) -> TrainedSentencePiece:
    return TrainedSentencePiece.model_validate({"vocab_size": 60, **changes})


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_same_text_gives_the_same_model_byte_for_byte(model_type: str) -> None:
    lines = [f"{line} {number}{number * number}" for number, line in enumerate(sentences(3000))]
    models = {train_sentencepiece(lines, options(model_type=model_type, vocab_size=150)) for _ in range(3)}
    assert len(models) == 1
    assert SentencePieceTokenizer(models.pop()).vocab_size == 150


@pytest.mark.parametrize(("model_type", "lines"), [("bpe", 300), ("bpe", 1), ("unigram", 300), ("unigram", 3)])
def test_a_vocabulary_beyond_the_text_names_the_size_that_works(model_type: str, lines: int) -> None:
    text = sentences(lines)
    with pytest.raises(
        DataError, match=r"vocab_size is 5000, the training text supports at most (\d+); set it to \1 or less"
    ) as caught:
        train_sentencepiece(text, options(model_type=model_type, vocab_size=5000))
    size = int(str(caught.value).split("set it to ")[1].split(" ")[0])
    assert SentencePieceTokenizer(train_sentencepiece(text, options(model_type=model_type, vocab_size=size))).vocab_size == size


def test_a_vocabulary_under_the_characters_names_the_size_that_works() -> None:
    with pytest.raises(DataError, match=r"vocab_size is 9, the characters .* together need (\d+); set it to more") as caught:
        train_sentencepiece(sentences(50), options(vocab_size=9))
    size = int(str(caught.value).split("together need ")[1].split(";")[0])
    assert SentencePieceTokenizer(train_sentencepiece(sentences(50), options(vocab_size=size))).vocab_size == size


@pytest.mark.parametrize("lines", [[], [""], ["  ", "\t"]])
def test_text_without_words_is_refused(lines: list[str]) -> None:
    with pytest.raises(DataError, match=r"the training text holds no words to train a tokenizer on; check data\.train"):
        train_sentencepiece(lines, options())


def test_user_symbols_are_pieces_after_the_specials() -> None:
    tokenizer = SentencePieceTokenizer(train_sentencepiece(sentences(100), options(user_symbols=("<2de>", "<mask>", "a,b"))))
    assert tokenizer.tokens(range(7)) == ["<s>", "<pad>", "</s>", "<unk>", "<2de>", "<mask>", "a,b"]
    (ids,) = tokenizer.encode(["<2de> the old<mask>dog a,b"])
    assert [ids.count(symbol) for symbol in (4, 5, 6)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        (("</s>",), r"'</s>' is the name of a special"),
        (("<x>", "<x>"), r"'<x>' occurs twice"),
        (("",), r"'' must be one or more characters without white space"),
        (("a b",), r"'a b' must be one or more characters without white space"),
        (("\u2581x",), r"'\u2581x' must be one or more characters without white space"),
    ],
)
def test_unusable_user_symbols_are_refused(symbols: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=rf"data\.tokenizer\.user_symbols: {message}"):
        train_sentencepiece(sentences(100), options(user_symbols=symbols))


def test_character_coverage_leaves_rare_characters_out() -> None:
    lines = [*sentences(300), "ж"]
    rare = [
        SentencePieceTokenizer(train_sentencepiece(lines, options(character_coverage=share))).encode(["ж"])[0]
        for share in (1.0, 0.99)
    ]
    assert 3 not in rare[0]
    assert 3 in rare[1]


def test_long_lines_take_part() -> None:
    """SentencePiece skips lines over 4,192 bytes without a word."""
    tokenizer = SentencePieceTokenizer(train_sentencepiece(["zebra " * 5000], options(vocab_size=14)))
    assert 3 not in tokenizer.encode(["zebra"])[0]


def trained(config: DataConfig, tokenizer: TrainedSentencePiece, directory: Path) -> TokenizerPair:
    sizes = [len(Path(source.source).read_text().splitlines()) for source in splits_of(config)["train"]]  # type: ignore[union-attr]
    TokenizerTrainer(config, sizes, directory)(tokenizer)
    return load_tokenizers(directory)


def test_joint_is_one_model_of_both_sides(tmp_path: Path) -> None:
    config = data_config(tmp_path, train=[parallel(tmp_path, "animals", ["cat dog"] * 9, ["жук мышь"] * 9)])
    pair = trained(config, options(vocab_size=25), tmp_path / "tokenizer")
    assert pair.shared
    assert not any(3 in row for row in pair.source.encode(["cat", "жук"]))
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == ["joint.model", "tokenizer.yaml"]


def test_separate_is_a_model_per_side(tmp_path: Path) -> None:
    config = data_config(tmp_path, train=[parallel(tmp_path, "animals", ["cat dog"] * 9, ["жук мышь"] * 9)])
    pair = trained(config, options(vocab_size=16, sharing="separate"), tmp_path / "tokenizer")
    assert not pair.shared
    assert 3 not in pair.source.encode(["cat"])[0]
    assert 3 in pair.source.encode(["жук"])[0]
    assert 3 not in pair.target.encode(["жук"])[0]


def test_training_lines_are_sampled_over_the_corpora(tmp_path: Path) -> None:
    corpora = [
        parallel(tmp_path, f"train{n}", [f"{n}{k:02d}" for k in range(50)], [f"t{n}{k:02d}" for k in range(50)]) for n in range(2)
    ]
    trainer = TokenizerTrainer(data_config(tmp_path, train=corpora), [50, 50], tmp_path)
    both = list(trainer._lines((0, 1), options(max_training_lines=10)))
    assert both == ["019", "t019", "039", "t039", "109", "t109", "129", "t129", "149", "t149"]
    assert len(list(trainer._lines((0,), options(max_training_lines=7)))) == 7
    assert len(list(trainer._lines((1,), options(max_training_lines=1000)))) == 100


def test_text_without_a_source_has_one_line_where_pairs_have_two(tmp_path: Path) -> None:
    pairs = parallel(tmp_path, "pairs", [f"s{k}" for k in range(6)], [f"t{k}" for k in range(6)])
    text = {"kind": "text", "path": str(write_lines(tmp_path / "text.txt", [f"x{k}" for k in range(4)]))}
    trainer = TokenizerTrainer(data_config(tmp_path, train=[pairs, text]), [6, 4], tmp_path)
    assert list(trainer._lines((0, 1), options()))[-6:] == ["s5", "t5", "x0", "x1", "x2", "x3"]
    assert list(trainer._lines((0, 1), options(max_training_lines=8))) == ["s1", "t1", "s3", "t3", "s5", "t5", "x1", "x3"]
    alone = TokenizerTrainer(data_config(tmp_path, train=[text]), [4], tmp_path)
    assert list(alone._lines((0, 1), options(max_training_lines=3))) == ["x1", "x2", "x3"]


def test_existing_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [train_sentencepiece(sentences(100, suffix=suffix), options(vocab_size=40)) for suffix in ("", "x")]
    for name, model in zip("ab", models, strict=True):
        (tmp_path / f"{name}.model").write_bytes(model)
    monkeypatch.setenv("DSTRAIN_DATA", str(tmp_path))
    one, two = ({"source_model": "${DSTRAIN_DATA}/a.model", **more} for more in ({}, {"target_model": str(tmp_path / "b.model")}))
    configs = [data_config(tmp_path, tokenizer={"kind": "sentencepiece_files", **content}).tokenizer for content in (one, two)]
    pairs = [load_configured_tokenizers(config) for config in configs]  # type: ignore[arg-type]
    assert [pair.shared for pair in pairs] == [True, False]
    assert pairs[1].target.fingerprint == SentencePieceTokenizer(models[1]).fingerprint


def test_an_existing_directory_of_dictionaries(tmp_path: Path) -> None:
    pair = TokenizerPair(DictionaryTokenizer(b"the 1\n"), DictionaryTokenizer(b"das 1\n"))
    save_tokenizers(pair, tmp_path / "tokenizer")
    config = data_config(tmp_path, tokenizer={"kind": "tokenizer_directory", "path": str(tmp_path / "tokenizer")}).tokenizer
    assert load_configured_tokenizers(config).fingerprint == pair.fingerprint  # type: ignore[arg-type]
