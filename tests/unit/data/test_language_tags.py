"""Source lines that begin with plain-text tags (`eng_Latn hin_Deva text`): each tag is one ordinary token, in first position."""

from pathlib import Path

import pytest

from dstrain.data.tokenizers.config import FairseqDictionaries, TrainedSentencePiece
from dstrain.data.tokenizers.tokenizer import (
    DictionaryTokenizer,
    SentencePieceTokenizer,
    TokenizerPair,
    load_tokenizers,
    save_tokenizers,
    with_tags,
)
from dstrain.data.tokenizers.training import load_configured_tokenizers, train_sentencepiece
from dstrain.errors import DataError
from tests.unit.data.corpus import sentences

TAGS = ("eng_Latn", "hin_Deva", "<2de>", "zho-Hans")
LINES = [f"{TAGS[number % 4]} {TAGS[(number + 1) % 4]} {line}" for number, line in enumerate(sentences(40))]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("with_tags", [False, True], ids=["trained on untagged text", "trained on tagged text"])
def test_a_trained_tokenizer_keeps_tags_whole(model_type: str, with_tags: bool) -> None:
    config = TrainedSentencePiece.model_validate(
        {"model_type": model_type, "vocab_size": 40, "user_symbols": ["<mask>"], "tags": TAGS}
    )
    text = LINES if with_tags else sentences(40)
    tokenizer = SentencePieceTokenizer(train_sentencepiece(text, config))
    assert tokenizer.tokens(range(4, 9)) == ["<mask>", *(f"\u2581{tag}" for tag in TAGS)]
    bare = tokenizer.encode(sentences(40))
    for number, (row, rest) in enumerate(zip(tokenizer.encode(LINES), bare, strict=True)):
        assert row == [5 + number % 4, 5 + (number + 1) % 4, *rest]
    assert tokenizer.decode(tokenizer.encode(LINES)) == LINES
    assert not {5, 6, 7, 8} & set(tokenizer.encode(["xeng_Latn the (hin_Deva)"])[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tags": ("</s>",)}, r"data\.tokenizer\.tags: '</s>' is the name of a special"),
        ({"tags": ("a b",)}, r"data\.tokenizer\.tags: 'a b' must be one or more characters without white space"),
        ({"tags": ("x", "x")}, r"data\.tokenizer\.tags: 'x' occurs twice"),
        ({"tags": ("ﬁn_Latn",)}, r"data\.tokenizer\.tags: 'ﬁn_Latn' is changed by SentencePiece's normalization \(NFKC\)"),
    ],
)
def test_what_cannot_be_a_tag_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_sentencepiece(sentences(40), TrainedSentencePiece.model_validate({"vocab_size": 70, **changes}))


def test_tags_before_a_sentencepiece_model_and_its_dictionary(tmp_path: Path) -> None:
    """A SentencePiece model trained without tags, and a dictionary that has them: what IndicTrans2 uses."""
    model = train_sentencepiece(sentences(200), TrainedSentencePiece(vocab_size=60))
    pieces = SentencePieceTokenizer(model)
    symbols = [*sorted({piece for row in pieces.encode(sentences(200)) for piece in pieces.tokens(row)}), *TAGS, "madeupword0000"]
    dictionary = "".join(f"{symbol} 1\n" for symbol in symbols).encode()
    bare = DictionaryTokenizer(dictionary, model)
    pair = with_tags(TokenizerPair(bare, bare), ["???_????", "<2de>", "zho-Hans"])
    save_tokenizers(pair, tmp_path / "tokenizer")
    tokenizer = load_tokenizers(tmp_path / "tokenizer").source
    assert tokenizer.fingerprint == pair.source.fingerprint != bare.fingerprint
    for line, row in zip(LINES, tokenizer.encode(LINES), strict=True):
        assert tokenizer.tokens(row[:2]) == line.split()[:2]
        assert row[2:] == tokenizer.encode([" ".join(line.split()[2:])])[0]
    assert tokenizer.decode(tokenizer.encode(LINES)) == LINES
    assert tokenizer.encode(["  eng_Latn\t the dog"]) == tokenizer.encode(["eng_Latn the dog"])
    assert tokenizer.decode(tokenizer.encode(["eng_Latn hin_Deva", "eng_Latn", ""])) == ["eng_Latn hin_Deva", "eng_Latn", ""]
    (inside,) = tokenizer.encode(["the dog eng_Latn"])
    assert symbols.index("eng_Latn") + 4 not in inside
    assert tokenizer.encode(sentences(40)) == bare.encode(sentences(40))
    assert bare.encode(["madeupword0000"]) == tokenizer.encode(["madeupword0000"]) != [[symbols.index("madeupword0000") + 4]]


def test_tags_that_no_dictionary_has_are_refused(tmp_path: Path) -> None:
    one, other = DictionaryTokenizer(b"eng_Latn 1\nthe 1\n"), DictionaryTokenizer(b"das 1\n")
    assert with_tags(TokenizerPair(one, other), ["eng_Latn"]).source.encode(["eng_Latn the"]) == [[4, 5]]
    with pytest.raises(DataError, match=r"neither dictionary has a symbol like the tag 'deu_\?\?\?\?'"):
        with_tags(TokenizerPair(one, other), ["eng_Latn", "deu_????"])
    with pytest.raises(DataError, match=r"dict\.txt lacks the tags fra_Latn"):
        DictionaryTokenizer(b"das 1\n", tags=["fra_Latn"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"source": "dict.txt", "tags": ["a"]}, r"tags act before a SentencePiece model, and there is none"),
        ({"source": "dict.txt", "target_model": "spm.model"}, r"target_model is set without target"),
    ],
)
def test_keys_of_dictionaries_that_would_not_act_are_refused(content: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FairseqDictionaries.model_validate(content)


def test_one_dictionary_and_model_serve_both_sides(tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_bytes(train_sentencepiece(sentences(200), TrainedSentencePiece(vocab_size=60)))
    (tmp_path / "dict.txt").write_text("\u2581the 1\neng_Latn 1\n")
    names = {"source": str(tmp_path / "dict.txt"), "source_model": str(tmp_path / "spm.model"), "tags": ("eng_Latn",)}
    pair = load_configured_tokenizers(FairseqDictionaries.model_validate(names))
    assert pair.shared
    assert pair.target.encode(["eng_Latn the"])[0][0] == 5
