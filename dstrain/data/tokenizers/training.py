"""Tokenizers for a corpus: trained on its training text, or taken as they are.

Training is deterministic: the sentences are spread evenly over the corpora, not sampled, and SentencePiece's thread count is
a constant (its unigram sums depend on that count, not on the machine). The same text gives the same model, byte for byte.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from dstrain.data.config import DataConfig, has_no_source
from dstrain.data.sources.corpora import parse, read_blocks
from dstrain.data.sources.fairseq_binary import IdBlock
from dstrain.data.sources.opening import require_file
from dstrain.data.sources.text import expand_path
from dstrain.data.tokenizers.config import FairseqDictionaries, SentencePieceFiles, TokenizerDirectory, TrainedSentencePiece
from dstrain.data.tokenizers.dictionary_file import SPECIAL_SYMBOLS
from dstrain.data.tokenizers.tokenizer import (
    WORD_START,
    DictionaryTokenizer,
    SentencePieceTokenizer,
    TokenizerPair,
    load_tokenizers,
    save_tokenizers,
    with_tags,
)
from dstrain.errors import DataError

TRAINING_THREADS = 16
MAX_TRAINING_CHARACTERS = 1000
"""A longer line is cut: SentencePiece silently skips lines over 4,192 bytes."""
CORPUS_TOO_SMALL = re.compile(r"Vocabulary size too high .* <= (\d+)")
VOCABULARY_TOO_SMALL = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")
NO_TEXT = re.compile(r"sentences_\.empty|all_chars_count")


def load_configured_tokenizers(config: SentencePieceFiles | TokenizerDirectory | FairseqDictionaries) -> TokenizerPair:
    """Read the tokenizers that a recipe names. Raises DataError if they are missing or broken."""
    if isinstance(config, TokenizerDirectory):
        return load_tokenizers(expand_path(config.path))
    if isinstance(config, FairseqDictionaries):
        dictionary = _dictionary(config.source, config.source_model)
        other = dictionary if config.target is None else _dictionary(config.target, config.target_model)
        return with_tags(TokenizerPair(dictionary, other), config.tags)
    source = SentencePieceTokenizer.from_file(_file(config.source_model))
    if config.target_model is None:
        return TokenizerPair(source, source)
    return TokenizerPair(source, SentencePieceTokenizer.from_file(_file(config.target_model)))


def _dictionary(path: str, model: str | None) -> DictionaryTokenizer:
    return DictionaryTokenizer.from_files(_file(path), None if model is None else _file(model))


def _file(path: str) -> Path:
    return require_file(expand_path(path))


class TokenizerTrainer:
    """Trains and saves the tokenizers of `config`; called in a process of its own, which Ctrl-C can end at any time."""

    def __init__(self, config: DataConfig, sizes: Sequence[int], directory: Path) -> None:
        self._config = config
        self._sizes = sizes
        self._directory = directory

    def __call__(self, tokenizer: TrainedSentencePiece) -> None:
        """Train. Raises DataError if the text does not support the vocabulary."""
        tags = tuple(dict.fromkeys([*tokenizer.tags, *self._config.tags]))
        tokenizer = tokenizer.model_copy(update={"tags": tags})
        if tokenizer.sharing == "joint":
            joint = SentencePieceTokenizer(train_sentencepiece(self._lines((0, 1), tokenizer), tokenizer))
            pair = TokenizerPair(joint, joint)
        else:
            models = [train_sentencepiece(self._lines((side,), tokenizer), tokenizer) for side in (0, 1)]
            pair = TokenizerPair(*map(SentencePieceTokenizer, models))
        save_tokenizers(pair, self._directory)

    def _lines(self, sides: tuple[int, ...], tokenizer: TrainedSentencePiece) -> Iterator[str]:
        """A sample of the training text of these sides at even intervals; text without a source has only a target side."""
        present = [[side for side in sides if side == 1 or not has_no_source([corpus])] for corpus in self._config.train]
        total, lines = sum(self._sizes), sum(size * len(own) for size, own in zip(self._sizes, present, strict=True))
        sample_size = min(total, max(1, total * tokenizer.max_training_lines // max(lines, 1)))
        number = 0
        for block in read_blocks("train", self._config.train, self._sizes, 0, total):
            assert not isinstance(block.text, IdBlock), "no tokenizer is trained on ids"
            for pair in zip(*parse(self._config.train[block.corpus], block.text), strict=True):
                if (number + 1) * sample_size // total > number * sample_size // total:
                    yield from (pair[side] for side in present[block.corpus])
                number += 1


def train_sentencepiece(lines: Iterable[str], config: TrainedSentencePiece) -> bytes:
    """Train a model on `lines`; ids 0 <s>, 1 <pad>, 2 </s>, 3 <unk>, then user symbols, then tags.

    A tag is the piece of a whole word: with its space before it. Raises DataError if a user symbol or a tag cannot be one or
    the text does not support the vocabulary, naming the size that it does.
    """
    check_symbols("data.tokenizer.user_symbols", config.user_symbols)
    check_symbols("data.tokenizer.tags", config.tags)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_short(lines),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            user_defined_symbols=[*config.user_symbols, *(WORD_START + tag for tag in config.tags)],
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_explain(str(error), config)) from error
    _check_tags(model.getvalue(), config.tags)
    return model.getvalue()


def _short(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if len(line) <= MAX_TRAINING_CHARACTERS:
            yield line
        else:
            yield from (line[start : start + MAX_TRAINING_CHARACTERS] for start in range(0, len(line), MAX_TRAINING_CHARACTERS))


def _check_tags(model: bytes, tags: Sequence[str]) -> None:
    """Raise DataError if a tag is not its own piece: SentencePiece normalizes text before it looks for pieces."""
    tokenizer = SentencePieceTokenizer(model)
    for tag in tags:
        (row,) = tokenizer.encode([tag])
        if tokenizer.tokens(row) != [WORD_START + tag]:
            raise DataError(
                f"data.tokenizer.tags: {tag!r} is changed by SentencePiece's normalization (NFKC); choose another tag"
            )


def check_symbols(key: str, symbols: Sequence[str]) -> None:
    """Raise DataError for what cannot be an entry. key: where they are named, for messages."""
    for number, symbol in enumerate(symbols):
        fault = None
        if symbol in SPECIAL_SYMBOLS:
            fault = "is the name of a special, which text must never produce"
        elif not symbol or WORD_START in symbol or any(character.isspace() or character == "\0" for character in symbol):
            fault = "must be one or more characters without white space"
        elif symbol in symbols[:number]:
            fault = "occurs twice"
        if fault:
            raise DataError(f"{key}: {symbol!r} {fault}; choose another symbol")


def _explain(message: str, config: TrainedSentencePiece) -> str:
    size = f"data.tokenizer.vocab_size is {config.vocab_size}"
    if match := CORPUS_TOO_SMALL.search(message):
        return f"{size}, the training text supports at most {match[1]}; set it to {match[1]} or less, or add text"
    if match := VOCABULARY_TOO_SMALL.search(message):
        return (
            f"{size}, the characters of the training text and the special symbols together need {match[1]}; set it to more, or "
            "lower data.tokenizer.character_coverage"
        )
    if NO_TEXT.search(message):
        return "the training text holds no words to train a tokenizer on; check data.train"
    return f"SentencePiece could not train a tokenizer: {message}"
