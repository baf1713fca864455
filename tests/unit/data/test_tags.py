"""Language tags: found whatever the tokenizer puts before them; strays, unknown tags and unused tags are errors."""

from pathlib import Path

import pytest

from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.data.prepared.prepare import prepare
from dstrain.data.tags import locate_tags
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, load_tokenizers
from dstrain.errors import DataError
from dstrain.protocols import TextTokenizer
from tests.unit.data.corpus import data_config, parallel, sentences

TAGS = [">>de<<", ">>fr<<"]


def prepared(folder: Path, *, stray: int | None = None, tags: list[str] = TAGS) -> tuple[TextTokenizer, Dataset]:
    source = [f"{tags[row % len(tags)]} {text}" for row, text in enumerate(sentences(40))]
    if stray is not None:
        source[stray] = "the old dog"
    folder.mkdir(exist_ok=True)
    train = [parallel(folder, "tagged", source, sentences(40, suffix="en"))]
    tokenizer = {"kind": "sentencepiece", "vocab_size": 70, "user_symbols": [*TAGS, ">>it<<"]}
    prepare(data_config(folder, train=train, tokenizer=tokenizer), folder / "data", workers=1, progress=False)
    return load_tokenizers(folder / "data" / "tokenizer").source, open_dataset(folder / "data", "train")


def test_the_position_is_after_the_start_of_a_word(tmp_path: Path) -> None:
    tokenizer, dataset = prepared(tmp_path)
    place = locate_tags(TAGS, tokenizer, dataset)
    assert place == 1
    assert {tokenizer.tokens([int(dataset[row].source[place])])[0] for row in range(len(dataset))} == set(TAGS)


def test_a_dictionary_has_them_in_front(tmp_path: Path) -> None:
    _, dataset = prepared(tmp_path)
    first = dataset[0].source[0]  # the start of a word begins every sentence here: as good as a tag
    words = "".join(f"w{number} 1\n" for number in range(70))
    tokenizer = DictionaryTokenizer(words.encode())
    assert locate_tags([f"w{first - 4}"], tokenizer, dataset) == 0


def test_a_sentence_without_a_tag_is_named(tmp_path: Path) -> None:
    tokenizer, dataset = prepared(tmp_path, stray=33)
    with pytest.raises(DataError, match=r"sentence 34 of the training data begins with .* none of the language tags"):
        locate_tags(TAGS, tokenizer, dataset)


def test_a_tag_that_no_sentence_has_is_an_error(tmp_path: Path) -> None:
    tokenizer, dataset = prepared(tmp_path)
    with pytest.raises(DataError, match="no sentence of the training data begins with the language tag '>>it<<'; remove it"):
        locate_tags([*TAGS, ">>it<<"], tokenizer, dataset)


def test_a_tag_that_is_no_symbol_is_an_error(tmp_path: Path) -> None:
    tokenizer, dataset = prepared(tmp_path)
    with pytest.raises(DataError, match=r"the language tag '>>xx<<' is no symbol of the source tokenizer.*user_symbols"):
        locate_tags([*TAGS, ">>xx<<"], tokenizer, dataset)
