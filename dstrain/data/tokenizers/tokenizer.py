"""Text to ids and back: SentencePiece models and fairseq dictionaries, single or as a pair for source and target.

A tokenizer is its bytes: it can be written, read back and compared by fingerprint, and the directory made by `save_tokenizers` is
the same in prepared data and in bundles. The special ids bos, pad and eos never come out of text, whatever the text spells.

SentencePiece normalizes its input by the rules stored in the model. For models that dstrain trains these are `nmt_nfkc`:
Unicode NFKC character by character, so that combining marks may keep their order; control characters vanish; white space,
zero-width spaces and non-joiners, marks of direction, U+2581 and U+FFFD are spaces, runs of them one, none at either end.
`decode(encode(text))` gives the normalized text back, with U+2047 for characters that the model never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import sentencepiece
from pydantic import Field

from dstrain.config_base import Config
from dstrain.data.sources.text import check_text
from dstrain.errors import DataError
from dstrain.storage.atomic import write_file
from dstrain.storage.document import DocumentFormat, RelativePath, path_inside
from dstrain.storage.hashing import sha256_of_bytes, sha256_of_text
from dstrain.storage.parsing import dump_yaml

if TYPE_CHECKING:
    from dstrain.protocols import TextTokenizer

TOKENIZER_FORMAT_VERSION = 1
TOKENIZER_FILE = "tokenizer.yaml"
SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
WORD_START = "\u2581"


class SentencePieceEntry(Config):
    """A tokenizer in tokenizer.yaml. model: its file, beside tokenizer.yaml."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    model: RelativePath


class DictionaryEntry(Config):
    """A tokenizer in tokenizer.yaml. dictionary, model: its files; see `DictionaryTokenizer`."""

    kind: Literal["dictionary"] = "dictionary"
    dictionary: RelativePath
    tags: tuple[str, ...] | None = None
    model: RelativePath | None = None


TokenizerEntry = Annotated[SentencePieceEntry | DictionaryEntry, Field(discriminator="kind")]


class TokenizerDescription(Config):
    """tokenizer.yaml. fingerprint: of both tokenizers together."""

    format_version: int
    fingerprint: str
    source: TokenizerEntry
    target: TokenizerEntry


DESCRIPTION_FORMAT = DocumentFormat(
    TokenizerDescription,
    "tokenizer description",
    DataError,
    "save the tokenizer again, or restore it from a copy",
    version_field="format_version",
    version=TOKENIZER_FORMAT_VERSION,
)


class SentencePieceTokenizer:
    """A SentencePiece model. Specials that it lacks get the ids after its last piece, in the order pad, eos, bos."""

    def __init__(self, model: bytes, *, name: str = "SentencePiece model") -> None:
        self._model = model
        self._processor = _open_model(model, name)
        self.vocab_size: int = self._processor.get_piece_size()
        self.unk_id: int = self._processor.unk_id()
        self.pad_id = self._own_or_appended(self._processor.pad_id())
        self.eos_id = self._own_or_appended(self._processor.eos_id())
        self.bos_id = self._own_or_appended(self._processor.bos_id())
        self._hidden = {self.bos_id, self.pad_id, self.eos_id}
        self._appended = {self.bos_id: "<s>", self.pad_id: "<pad>", self.eos_id: "</s>"}

    @classmethod
    def from_file(cls, path: Path) -> SentencePieceTokenizer:
        """Read a `.model` file. Raises DataError if it is missing or no SentencePiece model."""
        return cls(_read(path, "SentencePiece model"), name=str(path))

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, without EOS. One thread: parallelism belongs to the caller's processes."""
        ids: list[list[int]] = self._processor.encode(list(lines), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Normalized text of each id sequence."""
        visible = [[int(i) for i in row if i not in self._hidden] for row in ids]
        texts: list[str] = self._processor.decode(visible) if visible else []
        return texts

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The pieces of the ids."""
        return [self._appended.get(int(i)) or self._processor.id_to_piece(int(i)) for i in ids]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, under its kind."""
        return sha256_of_bytes(b"sentencepiece\0" + self._model)

    def save(self, directory: Path, stem: str) -> TokenizerEntry:
        """Write `directory`/`stem`.model; returns this tokenizer's entry for tokenizer.yaml."""
        write_file(directory / f"{stem}.model", self._model)
        return SentencePieceEntry(model=f"{stem}.model")

    def _own_or_appended(self, special_id: int) -> int:
        if special_id >= 0:
            return special_id
        self.vocab_size += 1
        return self.vocab_size - 1


class DictionaryTokenizer:
    """A fairseq `dict.txt`: white-space separated symbols, behind an optional SentencePiece model.

    Lines of the file are `symbol count`, line k (from 0) has id 4 + k, after <s> <pad> </s> <unk>. A symbol that occurs
    twice is an error unless the later line ends in `#fairseq:overwrite`; then text maps to the later id. Padding words are kept.

    tags: symbols of the dictionary that stay whole as words at the beginning of a line, before the text that the model splits:
    the language tags of some corpora.
    """

    bos_id, pad_id, eos_id, unk_id = range(4)

    def __init__(
        self, dictionary: bytes, model: bytes | None = None, *, tags: Sequence[str] = (), name: str = "dict.txt"
    ) -> None:
        self._dictionary = dictionary
        self._model = model
        self._processor = None if model is None else _open_model(model, f"SentencePiece model before {name}")
        self._symbols, self._ids = _parse_dictionary(dictionary, name)
        self._tags = frozenset(tags)
        if not self._tags <= self._ids.keys():
            raise DataError(f"{name} lacks the tags {', '.join(sorted(self._tags - self._ids.keys()))}; name symbols that it has")
        self.vocab_size = len(self._symbols)

    @classmethod
    def from_files(cls, dictionary: Path, model: Path | None = None, tags: Sequence[str] = ()) -> DictionaryTokenizer:
        """Read the files. Raises DataError if one is missing or malformed."""
        pieces = None if model is None else _read(model, "SentencePiece model")
        return cls(_read(dictionary, "dictionary"), pieces, tags=tags, name=str(dictionary))

    def with_tags(self, patterns: Sequence[str]) -> DictionaryTokenizer:
        """The same tokenizer with those symbols as tags that match one of the patterns; none needs to."""
        tags = [symbol for symbol in self._ids if any(fnmatchcase(symbol, pattern) for pattern in patterns)]
        return DictionaryTokenizer(self._dictionary, self._model, tags=tags)

    @property
    def tags(self) -> frozenset[str]:
        """Symbols that stay whole at the beginning of a line."""
        return self._tags

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, without EOS; a symbol that the dictionary lacks is `unk_id`, so is the name of a special."""
        if self._processor is None:
            rows = [line.split() for line in lines]
        else:
            tagged = [self._without_tags(line) for line in lines]
            pieces = self._processor.encode([text for _, text in tagged], out_type=str, num_threads=1)
            rows = [[*tags, *row] for (tags, _), row in zip(tagged, pieces, strict=True)]
        find, unknown = self._ids.get, self.unk_id
        return [[find(symbol, unknown) for symbol in row] for row in rows]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Symbols joined by spaces, or joined to words by the SentencePiece model."""
        hidden = {self.bos_id, self.pad_id, self.eos_id}
        rows = [self.tokens([i for i in row if i not in hidden]) for row in ids]
        if self._processor is None:
            return [" ".join(row) for row in rows]
        return [self._glued(row) for row in rows]

    def _without_tags(self, line: str) -> tuple[list[str], str]:
        """The tags at the beginning of a line, and the text after them."""
        tags = []
        while (words := line.split(maxsplit=1)) and words[0] in self._tags:
            tags.append(words[0])
            line = words[1] if len(words) > 1 else ""
        return tags, line

    def _glued(self, row: list[str]) -> str:
        tags = list(takewhile(self._tags.__contains__, row))
        text = "".join(row[len(tags) :]).replace(WORD_START, " ").strip()
        return " ".join([*tags, text] if text else tags)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The symbols of the ids."""
        return [self._symbols[i] for i in ids]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the symbols in order, their keys, the SentencePiece model and tags; counts do not matter."""
        table = repr((self._symbols, sorted(self._ids.items()))).encode()
        tags = "".join(f"\0{tag}" for tag in sorted(self._tags)).encode()
        symbols = bytes.fromhex(sha256_of_bytes(table))
        return sha256_of_bytes(b"dictionary\0" + symbols + (self._model or b"") + tags)

    def save(self, directory: Path, stem: str) -> TokenizerEntry:
        """Write `directory`/`stem`.dict.txt and the model if any; returns this tokenizer's entry for tokenizer.yaml."""
        write_file(directory / f"{stem}.dict.txt", self._dictionary)
        model = None if self._model is None else f"{stem}.model"
        if self._model is not None:
            write_file(directory / f"{stem}.model", self._model)
        return DictionaryEntry(dictionary=f"{stem}.dict.txt", tags=tuple(sorted(self._tags)) or None, model=model)


@dataclass(frozen=True)
class TokenizerPair:
    """How source and target are read; the same object twice if both share one vocabulary."""

    source: TextTokenizer
    target: TextTokenizer

    @property
    def shared(self) -> bool:
        """Whether an id means the same on both sides."""
        return self.source.fingerprint == self.target.fingerprint

    @property
    def fingerprint(self) -> str:
        """SHA-256 over both sides."""
        return sha256_of_text(f"{self.source.fingerprint} {self.target.fingerprint}")


def with_tags(pair: TokenizerPair, patterns: Sequence[str]) -> TokenizerPair:
    """Both sides with the symbols that match a pattern as tags, which the model in front of a dictionary then does not split.

    patterns: symbols, or patterns such as `???_????`. Raises DataError if one matches no symbol of either dictionary.
    """
    sides = [side.with_tags(patterns) if isinstance(side, DictionaryTokenizer) else side for side in (pair.source, pair.target)]
    tags = [tag for side in sides if isinstance(side, DictionaryTokenizer) for tag in side.tags]
    for pattern in patterns:
        if not any(fnmatchcase(tag, pattern) for tag in tags):
            raise DataError(f"neither dictionary has a symbol like the tag {pattern!r}; name tags as the dictionaries spell them")
    return TokenizerPair(*sides)


def save_tokenizers(pair: TokenizerPair, directory: Path) -> None:
    """Write both tokenizers under `directory`; tokenizer.yaml comes last, so a directory that has it is whole."""
    directory = Path(directory)
    source = _save(pair.source, directory, "joint" if pair.shared else "source")
    target = source if pair.shared else _save(pair.target, directory, "target")
    description = TokenizerDescription(
        format_version=TOKENIZER_FORMAT_VERSION, fingerprint=pair.fingerprint, source=source, target=target
    )
    content = description.model_dump(mode="json", exclude_none=True)
    write_file(directory / TOKENIZER_FILE, dump_yaml(content).encode())


def load_tokenizers(directory: Path) -> TokenizerPair:
    """Read what `save_tokenizers` wrote.

    Raises DataError if a file is missing, tokenizer.yaml is malformed or of another version, or the files are not those that
    were saved (by fingerprint).
    """
    directory = Path(directory)
    description = DESCRIPTION_FORMAT.read(directory / TOKENIZER_FILE)
    source = _load(directory, description.source)
    target = source if description.target == description.source else _load(directory, description.target)
    pair = TokenizerPair(source, target)
    if pair.fingerprint != description.fingerprint:
        raise DataError(f"{directory}: the tokenizer files were altered after {TOKENIZER_FILE} was written; restore them")
    return pair


def _save(tokenizer: TextTokenizer, directory: Path, stem: str) -> TokenizerEntry:
    if isinstance(tokenizer, SentencePieceTokenizer | DictionaryTokenizer):
        return tokenizer.save(directory, stem)
    raise TypeError(f"{type(tokenizer).__name__} cannot be saved")


def _load(directory: Path, entry: TokenizerEntry) -> SentencePieceTokenizer | DictionaryTokenizer:
    remedy = DESCRIPTION_FORMAT.remedy
    model = None if entry.model is None else path_inside(directory, entry.model, error=DataError, remedy=remedy)
    if isinstance(entry, SentencePieceEntry):
        return SentencePieceTokenizer.from_file(directory / entry.model)
    dictionary = path_inside(directory, entry.dictionary, error=DataError, remedy=remedy)
    return DictionaryTokenizer.from_files(dictionary, model, entry.tags or ())


def _read(path: Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{what} {path}: {error.strerror}; check the path") from error


def _open_model(model: bytes, name: str) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        raise DataError(f"{name} is not a SentencePiece model; check the file") from error
    if not loaded or processor.get_piece_size() == 0:
        raise DataError(f"{name} is not a SentencePiece model; check the file")
    return processor


def _parse_dictionary(content: bytes, name: str) -> tuple[list[str], dict[str, int]]:
    """The symbols by id, and the id that a symbol of text gets. The names of the specials are not text."""
    check_text(name, content, 0)
    text = content.decode("utf-8")
    symbols = list(SPECIAL_SYMBOLS)
    ids: dict[str, int] = {}
    taken = set(symbols)
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        symbol, _, count = line.rstrip().rpartition(" ")
        overwrite = count == "#fairseq:overwrite"
        if overwrite:
            symbol, _, count = symbol.rpartition(" ")
        if not symbol or not count.lstrip("-").isdecimal():
            raise DataError(f"{name}:{number}: {line[:80]!r} is not `symbol count`; use a fairseq dictionary")
        if symbol in taken and not overwrite:
            raise DataError(
                f"{name}:{number}: symbol {symbol!r} occurs twice; remove the line or end it with `#fairseq:overwrite`"
            )
        taken.add(symbol)
        ids[symbol] = len(symbols)
        symbols.append(symbol)
    return symbols, ids
