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
from dstrain.data.tokenizers.dictionary_file import SPECIAL_SYMBOLS, Markers, parse_dictionary
from dstrain.data.tokenizers.piece_format import user_defined_piece
from dstrain.errors import DataError
from dstrain.storage.atomic import write_file
from dstrain.storage.document import DocumentFormat, RelativePath, path_inside
from dstrain.storage.hashing import sha256_of_bytes, sha256_of_text
from dstrain.storage.parsing import dump_yaml

if TYPE_CHECKING:
    from dstrain.protocols import TextTokenizer

TOKENIZER_FORMAT_VERSION = 1
TOKENIZER_FILE = "tokenizer.yaml"
WORD_START = "\u2581"
NON_CHARACTER = "\uffff"


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
    markers: Markers | None = None


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
        self.start_id = self.eos_id
        self._hidden = {self.bos_id, self.pad_id, self.eos_id}
        self._appended = {self.bos_id: "<s>", self.pad_id: "<pad>", self.eos_id: "</s>"}

    @classmethod
    def from_file(cls, path: Path) -> SentencePieceTokenizer:
        """Read a `.model` file. Raises DataError if it is missing or no SentencePiece model."""
        return cls(_read(path, "SentencePiece model"), name=str(path))

    def with_pieces(self, pieces: Sequence[str]) -> SentencePieceTokenizer:
        """The same tokenizer with user-defined pieces after its own: text is never split within them."""
        return SentencePieceTokenizer(self._model + b"".join(map(user_defined_piece, pieces)))

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, without EOS. One thread: parallelism belongs to the caller's processes."""
        ids: list[list[int]] = self._processor.encode(list(lines), out_type=int, num_threads=1)
        return ids

    def encode_prefixes(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of the beginnings of targets: as `encode`."""
        return self.encode(lines)

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
    the language tags of some corpora. markers: symbols around every text.
    """

    bos_id, pad_id, unk_id = 0, 1, 3

    def __init__(
        self,
        dictionary: bytes,
        model: bytes | None = None,
        *,
        tags: Sequence[str] = (),
        markers: Markers | None = None,
        name: str = "dict.txt",
    ) -> None:
        self._dictionary = dictionary
        self._model = model
        self._processor = None if model is None else _open_model(model, f"SentencePiece model before {name}")
        self._symbols, self._ids = parse_dictionary(dictionary, name)
        self._tags = frozenset(tags)
        if not self._tags <= self._ids.keys():
            raise DataError(f"{name} lacks the tags {', '.join(sorted(self._tags - self._ids.keys()))}; name symbols that it has")
        self.vocab_size = len(self._symbols)
        self.markers = markers or Markers()
        self._before, self._after, ends = (
            self._marker_ids(symbols, name)
            for symbols in (self.markers.before, self.markers.after, (self.markers.end, self.markers.start or self.markers.end))
        )
        self.eos_id, self.start_id = ends
        self._hidden = {*range(self.unk_id), *self._before, *self._after, *ends}

    @classmethod
    def from_files(
        cls, dictionary: Path, model: Path | None = None, tags: Sequence[str] = (), markers: Markers | None = None
    ) -> DictionaryTokenizer:
        """Read the files. Raises DataError if one is missing or malformed."""
        pieces = None if model is None else _read(model, "SentencePiece model")
        return cls(_read(dictionary, "dictionary"), pieces, tags=tags, markers=markers, name=str(dictionary))

    def with_tags(self, patterns: Sequence[str]) -> DictionaryTokenizer:
        """The same tokenizer with those symbols as tags that match one of the patterns; none needs to."""
        tags = [symbol for symbol in self._ids if any(fnmatchcase(symbol, pattern) for pattern in patterns)]
        return DictionaryTokenizer(self._dictionary, self._model, tags=tags, markers=self.markers)

    def with_symbols(
        self, symbols: Sequence[str], *, tags: Sequence[str] = (), markers: Markers | None = None
    ) -> DictionaryTokenizer:
        """The same tokenizer after these symbols, but those that it has, are appended to the dictionary.

        tags: of them, those that stay whole before text that a model splits. markers: None for its own.
        """
        lines = [self._dictionary, *(f"{symbol} 0".encode() for symbol in symbols if symbol not in self._ids)]
        dictionary = b"\n".join(line.removesuffix(b"\n") for line in lines if line) + b"\n"
        kept = self._tags if self._model is None else self._tags.union(tags)
        return DictionaryTokenizer(dictionary, self._model, tags=sorted(kept), markers=markers or self.markers)

    def _marker_ids(self, symbols: Sequence[str], name: str) -> list[int]:
        ids = {**self._ids, **{symbol: number for number, symbol in enumerate(SPECIAL_SYMBOLS)}}
        lacking = [symbol for symbol in dict.fromkeys(symbols) if symbol not in ids]
        if lacking:
            raise DataError(f"{name} lacks the markers {', '.join(lacking)}; give the dictionary that the model was trained with")
        return [ids[symbol] for symbol in symbols]

    @property
    def splits_words(self) -> bool:
        """Whether a SentencePiece model splits text into symbols; else white space does."""
        return self._processor is not None

    @property
    def tags(self) -> frozenset[str]:
        """Symbols that stay whole at the beginning of a line."""
        return self._tags

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line with its markers, without EOS; a symbol that the dictionary lacks is `unk_id`, so is a special's name.

        An empty line stays empty.
        """
        return [[*self._before, *row, *self._after] if row else row for row in self._encode_text(lines)]

    def encode_prefixes(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of the beginnings of targets, empty ones included: without the markers behind a text."""
        return [[*self._before, *row] for row in self._encode_text(lines)]

    def _encode_text(self, lines: Sequence[str]) -> list[list[int]]:
        if self._processor is None:
            rows = [line.split() for line in lines]
        else:
            tagged = [self._without_tags(line) for line in lines]
            pieces = self._processor.encode([text for _, text in tagged], out_type=str, num_threads=1)
            rows = [[*tags, *row] for (tags, _), row in zip(tagged, pieces, strict=True)]
        find, unknown = self._ids.get, self.unk_id
        return [[find(symbol, unknown) for symbol in row] for row in rows]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Symbols joined by spaces, or joined to words by the SentencePiece model; markers are left out."""
        rows = [self.tokens([i for i in row if i not in self._hidden]) for row in ids]
        if self._processor is None:
            return [" ".join(row) for row in rows]
        tags = [list(takewhile(self._tags.__contains__, row)) for row in rows]
        texts = self._text_of_pieces([row[len(first) :] for first, row in zip(tags, rows, strict=True)])
        return [" ".join([*first, text] if text else first) for first, text in zip(tags, texts, strict=True)]

    def _without_tags(self, line: str) -> tuple[list[str], str]:
        """The tags at the beginning of a line, and the text after them."""
        tags = []
        while (words := line.split(maxsplit=1)) and words[0] in self._tags:
            tags.append(words[0])
            line = words[1] if len(words) > 1 else ""
        return tags, line

    def _text_of_pieces(self, rows: list[list[str]]) -> list[str]:
        """As the model spells its pieces, byte pieces as UTF-8. Symbols that it lacks are spelled as in the dictionary."""
        unknown = SPECIAL_SYMBOLS[self.unk_id]
        # the model would spell its unknown piece U+2047, as text may be spelled; a non-character stays as it is
        hidden = [[NON_CHARACTER if piece == unknown else piece for piece in row] for row in rows]
        texts: list[str] = self._processor.decode(hidden) if self._processor and hidden else []
        return [
            text.replace(NON_CHARACTER, unknown).replace(WORD_START, " ").strip()
            if NON_CHARACTER in text or WORD_START in text
            else text
            for text in texts
        ]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The symbols of the ids."""
        return [self._symbols[i] for i in ids]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the symbols in order, their keys, the SentencePiece model, tags, markers; counts do not matter."""
        table = repr((self._symbols, sorted(self._ids.items()))).encode()
        tags = "".join(f"\0{tag}" for tag in sorted(self._tags)).encode()
        symbols = bytes.fromhex(sha256_of_bytes(table))
        markers = b"" if self.markers == Markers() else b"\0" + self.markers.model_dump_json(exclude_defaults=True).encode()
        return sha256_of_bytes(b"dictionary\0" + symbols + (self._model or b"") + tags + markers)

    def save(self, directory: Path, stem: str) -> TokenizerEntry:
        """Write `directory`/`stem`.dict.txt and the model if any; returns this tokenizer's entry for tokenizer.yaml."""
        write_file(directory / f"{stem}.dict.txt", self._dictionary)
        model = None if self._model is None else f"{stem}.model"
        if self._model is not None:
            write_file(directory / f"{stem}.model", self._model)
        markers = None if self.markers == Markers() else self.markers
        tags = tuple(sorted(self._tags)) or None
        return DictionaryEntry(dictionary=f"{stem}.dict.txt", tags=tags, model=model, markers=markers)


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
    return DictionaryTokenizer.from_files(dictionary, model, entry.tags or (), entry.markers)


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
