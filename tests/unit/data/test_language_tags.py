"""Source lines that begin with plain-text tags (`eng_Latn hin_Deva text`): each tag is one ordinary token, in first position."""

from pathlib import Path

import pytest

from dstrain.data.config import TrainedSentencePiece
from dstrain.data.tokenizer import DictionaryTokenizer, SentencePieceTokenizer
from dstrain.data.tokenizer_training import train_sentencepiece
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
        ({"tags": ("x", "x")}, r"data\.tokenizer\.tags: 'x' stands there twice"),
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
    tokenizer = DictionaryTokenizer("".join(f"{symbol} 1\n" for symbol in symbols).encode(), model)
    for line, row in zip(LINES, tokenizer.encode(LINES), strict=True):
        assert tokenizer.tokens(row[:2]) == line.split()[:2]
        assert row[2:] == tokenizer.encode([" ".join(line.split()[2:])])[0]
    assert tokenizer.decode(tokenizer.encode(LINES)) == LINES
    assert tokenizer.encode(["  eng_Latn\t the dog"]) == tokenizer.encode(["eng_Latn the dog"])
    assert tokenizer.decode(tokenizer.encode(["eng_Latn hin_Deva", "eng_Latn", ""])) == ["eng_Latn hin_Deva", "eng_Latn", ""]
    (inside,) = tokenizer.encode(["the dog eng_Latn"])
    assert symbols.index("eng_Latn") + 4 not in inside
