import io
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.tokenizers.config import TrainedSentencePiece
from dstrain.data.tokenizers.dictionary_file import Markers
from dstrain.data.tokenizers.tokenizer import (
    DictionaryTokenizer,
    SentencePieceTokenizer,
    TokenizerPair,
    load_tokenizers,
    save_tokenizers,
)
from dstrain.data.tokenizers.training import train_sentencepiece
from dstrain.data.tokenizers.unknown import unreachable_tags
from dstrain.errors import DataError
from tests.unit.data.corpus import sentences

HORRIBLE = [
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 👍🏽",
    "שלום עולם مرحبا بالعالم",
    "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u0324\u031e",
    "नमस्ते दुनिया ক্ষ",
    "ﬁﬂ ①② ＡＢＣ ㎏ ½",
    "tab\there no\u00a0break zero\u200bwidth \u3000 wide",
    "control \x01\x07\x1b\x7f end",
    "\u202eright to left\u202c \ufeffmark",
    "<s> </s> <pad> <unk> \u2581 @@ ##",
    "\U0010ffff \ue000 \ufffd",
    "a" * 500,
    "   ",
    "",
]
SPECIALS = (0, 1, 2)


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece([*sentences(200), *HORRIBLE, "< / > s p a d u n k @ # _"], TrainedSentencePiece(vocab_size=260))


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model)


def trained(**options: object) -> bytes:
    """A model as SentencePiece itself makes it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(200)),
        model_writer=model,
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 60, **options},
    )
    return model.getvalue()


def expected_text(line: str) -> str:
    """nmt_nfkc from its description: controls vanish, every kind of space and mark of direction is one space, NFKC."""
    gone = {*map(chr, range(1, 9)), "\x0b", *map(chr, range(14, 32)), "\x7f", *map(chr, range(0x80, 0xA0))} - {"\x85"}
    spaces = {"\u061c", "\u200b", "\u200c", "\u200e", "\u200f", "\u2028", "\u2029", "\u2581", "\ufeff", "\ufffd"}
    kept = "".join(" " if character in spaces else character for character in line if character not in gone)
    return " ".join(unicodedata.normalize("NFKC", kept).split())


@pytest.mark.parametrize("line", HORRIBLE, ids=ascii)
def test_horrible_strings_come_back_normalized(tokenizer: SentencePieceTokenizer, line: str) -> None:
    (ids,) = tokenizer.encode([line])
    assert tokenizer.unk_id not in ids
    assert unicodedata.normalize("NFKC", tokenizer.decode([ids])[0]) == expected_text(line)


@settings(max_examples=300, deadline=None)
@given(line=st.text(st.sampled_from(sorted(set("".join(HORRIBLE)) | set("</s>pad unk▁\t\n"))), max_size=40))
def test_any_mixture_of_horrors_comes_back_normalized(tokenizer: SentencePieceTokenizer, line: str) -> None:
    (ids,) = tokenizer.encode([line])
    (text,) = tokenizer.decode([ids])
    assert not set(ids) & set(SPECIALS)
    if tokenizer.unk_id not in ids:
        assert unicodedata.normalize("NFKC", text) == expected_text(line)


@settings(max_examples=300, deadline=None)
@given(
    line=st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
    | st.sampled_from(["<s>", "</s>", "<pad>", "<s></s>", "\0</s>"])
)
def test_no_text_gives_a_special_id(tokenizer: SentencePieceTokenizer, line: str) -> None:
    for ids in tokenizer.encode([line, f"dog {line}", f"{line}</s>"]):
        assert not set(ids) & set(SPECIALS)
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_ids_follow_the_convention(tokenizer: SentencePieceTokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 260
    assert tokenizer.tokens([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]


def test_many_lines_are_the_lines_one_by_one(tokenizer: SentencePieceTokenizer) -> None:
    lines = sentences(50)
    assert tokenizer.encode(lines) == [tokenizer.encode([line])[0] for line in lines]
    assert tokenizer.decode(tokenizer.encode(lines)) == lines
    assert tokenizer.encode([]) == tokenizer.decode([]) == []


def test_decoding_leaves_specials_out(tokenizer: SentencePieceTokenizer) -> None:
    (ids,) = tokenizer.encode(["the old dog"])
    assert tokenizer.decode([[0, *ids, 2, 1, 1], [2], []]) == ["the old dog", "", ""]


def test_a_taken_model_without_pad_gets_one_appended() -> None:
    model = trained()
    assert sentencepiece.SentencePieceProcessor(model_proto=model).pad_id() == -1
    tokenizer = SentencePieceTokenizer(model)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 2, 60, 61)
    (ids,) = tokenizer.encode(["the old dog"])
    assert tokenizer.decode([[*ids, 2, 60]]) == ["the old dog"]
    assert tokenizer.tokens([59, 60])[1] == "<pad>"


def test_a_taken_model_without_any_special_gets_all() -> None:
    tokenizer = SentencePieceTokenizer(trained(bos_id=-1, eos_id=-1, unk_id=0))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (60, 61, 62, 63)
    assert tokenizer.tokens([60, 61, 62]) == ["<pad>", "</s>", "<s>"]
    assert tokenizer.decode([[*tokenizer.encode(["red cat"])[0], 61, 60, 62]]) == ["red cat"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x0a\x02hi"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "my.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"my\.model is not a SentencePiece model; check the file"):
        SentencePieceTokenizer.from_file(path)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"SentencePiece model .*/none\.model: No such file or directory; check the path"):
        SentencePieceTokenizer.from_file(tmp_path / "none.model")


DICTIONARY = "the 90\nold 80\n\u2581dog 7\ncat 5\nmadeupword0000 0\nmadeupword0001 0\n"


def test_a_dictionary_counts_from_four_and_keeps_padding_words() -> None:
    tokenizer = DictionaryTokenizer(DICTIONARY.encode())
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 10
    assert tokenizer.encode(["the  cat\told", " zebra the", ""]) == [[4, 7, 5], [3, 4], []]
    assert tokenizer.tokens([0, 1, 2, 3, 6, 9]) == ["<s>", "<pad>", "</s>", "<unk>", "\u2581dog", "madeupword0001"]
    assert tokenizer.decode([[0, 4, 3, 7, 2, 1]]) == ["the <unk> cat"]


def test_the_names_of_specials_are_unknown_words() -> None:
    assert DictionaryTokenizer(DICTIONARY.encode()).encode(["<s> <pad> </s> <unk> the"]) == [[3, 3, 3, 3, 4]]


def test_the_golden_dictionary_gives_the_golden_ids() -> None:
    from tests.paths import GOLDEN

    directory = GOLDEN / "data"
    if not directory.is_dir():
        pytest.skip(f"no golden values at {GOLDEN}; set DSTRAIN_GOLDEN")
    import numpy as np

    for language in ("en", "de"):
        tokenizer = DictionaryTokenizer.from_files(directory / f"bin_sep/dict.{language}.txt")
        raw = next((directory / "raw").glob(f"train*.{language}"))
        ids = [token for row in tokenizer.encode(raw.read_text().splitlines()) for token in (*row, tokenizer.eos_id)]
        assert ids == np.fromfile(directory / f"bin_sep/train.en-de.{language}.bin", np.uint16).tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("the 1\ncat 2\nthe 3\n", r"dict\.txt:3: symbol 'the' occurs twice; .* `#fairseq:overwrite`"),
        ("<pad> 1\n", r"dict\.txt:1: symbol '<pad>' occurs twice"),
        ("the 1\ncat\n", r"dict\.txt:2: 'cat' is not `symbol count`"),
        ("the 1\n\n", r"dict\.txt:2: '' is not `symbol count`"),
        ("the one\n", r"dict\.txt:1: 'the one' is not `symbol count`"),
        ("", r"dict\.txt:1: '' is not `symbol count`"),
    ],
)
def test_a_malformed_dictionary_is_refused(content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        DictionaryTokenizer(content.encode())


def test_a_byte_order_mark_is_no_part_of_the_first_symbol() -> None:
    assert DictionaryTokenizer("\ufeffthe 9\ncat 8\n".encode()).encode(["the cat"]) == [[4, 5]]


def test_overwrite_lets_the_later_id_win() -> None:
    tokenizer = DictionaryTokenizer(b"the 9\ncat 8\nthe 7 #fairseq:overwrite\n<pad> 1 #fairseq:overwrite\n")
    assert tokenizer.encode(["the cat <pad>"]) == [[6, 5, 7]]
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (1, 8)


def test_a_dictionary_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "dict.de.txt"
    path.write_bytes(b"gut 1\nsch\xf6n 1\n")
    with pytest.raises(DataError, match=r"dict\.de\.txt:2: invalid UTF-8"):
        DictionaryTokenizer.from_files(path)


def test_a_sentencepiece_model_in_front_of_a_dictionary(model: bytes, tokenizer: SentencePieceTokenizer) -> None:
    pieces = sorted({piece for row in tokenizer.encode(sentences(200)) for piece in tokenizer.tokens(row)})
    both = DictionaryTokenizer("".join(f"{piece} 1\n" for piece in pieces).encode(), model)
    lines = sentences(20)
    assert [both.tokens(row) for row in both.encode(lines)] == [tokenizer.tokens(row) for row in tokenizer.encode(lines)]
    assert both.decode(both.encode(lines)) == lines
    assert both.encode(["</s> ☃"])[0].count(both.unk_id) > 0
    assert not {0, 1, 2} & set(both.encode(["<s> </s> <pad>"])[0])


MODELS: dict[str, dict[str, object]] = {
    "bytes": {},
    "spaces as they are": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "space behind": {"treat_whitespace_as_suffix": True},
    "no space before": {"add_dummy_prefix": False},
}


@pytest.mark.parametrize("kind", MODELS)
def test_text_behind_a_dictionary_is_spelled_as_the_model_spells_it(kind: str) -> None:
    """Byte pieces become the characters that they are the UTF-8 of, those of a broken character U+FFFD."""
    model = trained(**{"byte_fallback": True, "vocab_size": 330, **MODELS[kind]})
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [piece for piece in map(processor.id_to_piece, range(330)) if piece not in ("<unk>", "<s>", "</s>")]
    tokenizer = DictionaryTokenizer("".join(f"{piece} 1\n" for piece in [*pieces, "\u2581own", "eng_Latn"]).encode(), model)
    lines = [*sentences(5), *HORRIBLE, "日本語 \U0001f600é", " the  old "]
    ids = tokenizer.encode(lines)
    assert not any(tokenizer.unk_id in row for row in ids)
    assert tokenizer.decode(ids) == processor.decode(processor.encode(lines))
    cut = [row[: len(row) // 2] for row in ids]
    assert tokenizer.decode(cut) == processor.decode([tokenizer.tokens(row) for row in cut])
    assert tokenizer.decode([]) == []


def test_symbols_that_the_model_lacks_are_spelled_as_in_the_dictionary(model: bytes) -> None:
    dictionary = "\u2581the 9\n\u2581own 8\n\u2753 7\neng_Latn 1\n"
    tokenizer = DictionaryTokenizer(dictionary.encode(), model, tags=["eng_Latn"])
    assert tokenizer.decode([[4, 5, 6, 3, 5], [5], [7, 5], [7]]) == ["the own\u2753<unk> own", "own", "eng_Latn own", "eng_Latn"]


def test_markers_are_around_every_text_but_an_empty_one_and_never_shown(tmp_path: Path) -> None:
    markers = Markers(before=("__de__",), after=("</s>", "</s>"), end="[en]", start="__de__")
    tokenizer = DictionaryTokenizer(DICTIONARY.encode()).with_symbols(["__de__", "cat", "[en]"], markers=markers)
    assert tokenizer.tokens([10, 11]) == ["__de__", "[en]"]
    assert (tokenizer.eos_id, tokenizer.start_id, tokenizer.vocab_size) == (11, 10, 12)
    assert tokenizer.encode(["the cat", ""]) == [[10, 4, 7, 2, 2], []]
    assert tokenizer.encode_prefixes(["the", ""]) == [[10, 4], [10]]
    assert tokenizer.decode([[10, 4, 7, 2, 2, 11]]) == ["the cat"]
    plain = DictionaryTokenizer(DICTIONARY.encode()).with_symbols(["__de__", "[en]"])
    assert (
        tokenizer.fingerprint != plain.fingerprint == DictionaryTokenizer(DICTIONARY.encode() + b"__de__ 1\n[en] 1\n").fingerprint
    )
    save_tokenizers(TokenizerPair(tokenizer, plain), tmp_path)
    loaded = load_tokenizers(tmp_path)
    assert loaded.source.encode(["the"]) == [[10, 4, 2, 2]]
    assert (loaded.source.eos_id, loaded.target.eos_id) == (11, 2)
    front = DictionaryTokenizer((DICTIONARY + "__de__ 1\n").encode(), trained())
    assert unreachable_tags(front) == ["__de__"]
    assert unreachable_tags(front.with_symbols([], markers=Markers(before=("__de__",)))) == []
    with pytest.raises(DataError, match=r"lacks the markers \[fr\]; give the dictionary that the model was trained with"):
        tokenizer.with_symbols([], markers=Markers(end="[fr]"))


def pairs_of(model: bytes) -> list[TokenizerPair]:
    joint, other = SentencePieceTokenizer(model), SentencePieceTokenizer(trained())
    dictionary, front = DictionaryTokenizer(DICTIONARY.encode()), DictionaryTokenizer(DICTIONARY.encode(), model)
    return [
        TokenizerPair(joint, joint),
        TokenizerPair(joint, other),
        TokenizerPair(dictionary, front),
        TokenizerPair(other, dictionary),
    ]


@pytest.mark.parametrize("number", range(4))
def test_tokenizers_come_back_from_a_directory(tmp_path: Path, model: bytes, number: int) -> None:
    pair = pairs_of(model)[number]
    save_tokenizers(pair, tmp_path / "tokenizer")
    loaded = load_tokenizers(tmp_path / "tokenizer")
    assert (loaded.fingerprint, loaded.shared) == (pair.fingerprint, number == 0)
    lines = [*sentences(10), *HORRIBLE]
    assert loaded.source.encode(lines) == pair.source.encode(lines)
    assert loaded.target.encode(lines) == pair.target.encode(lines)
    save_tokenizers(loaded, tmp_path / "again")
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("tokenizer", "again"))
    assert first == second


def test_fingerprints_differ_where_ids_differ(model: bytes) -> None:
    assert len({pair.fingerprint for pair in pairs_of(model)}) == 4
    plain = DictionaryTokenizer(b"a 1\nb 1\n")
    assert plain.fingerprint == DictionaryTokenizer(b"a 5\nb 2\n").fingerprint
    assert plain.fingerprint != DictionaryTokenizer(b"b 1\na 1\n").fingerprint


def test_missing_and_altered_tokenizer_files(tmp_path: Path, model: bytes) -> None:
    pair = pairs_of(model)[1]
    save_tokenizers(pair, tmp_path)
    (tmp_path / "target.model").unlink()
    with pytest.raises(DataError, match=r"SentencePiece model .*target\.model: No such file"):
        load_tokenizers(tmp_path)
    (tmp_path / "target.model").write_bytes(model)
    with pytest.raises(DataError, match=r"the tokenizer files were altered after tokenizer\.yaml was written"):
        load_tokenizers(tmp_path)
    with pytest.raises(DataError, match=r"/none/tokenizer\.yaml is missing; save the tokenizer again"):
        load_tokenizers(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("format_version: 9\n", "has format_version 9, this dstrain reads 1"),
        ("- a\n", r"holds no mapping of fields but \['a'\]"),
        ("", r"is not valid YAML \(the file is empty\): it was altered"),
        ("a: [b\n", "is not valid YAML"),
        ("format_version: 1\nsource: {kind: bpe}\n", r"source\.kind: 'bpe' is unknown; choose one of"),
        ("format_version: 1\nsource: {kind: sentencepiece}\n", r"source\.model: missing; give it a value"),
    ],
)
def test_a_malformed_description_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.yaml").write_text(content)
    with pytest.raises(DataError, match=rf"tokenizer\.yaml.*{message}"):
        load_tokenizers(tmp_path)
