"""Tokenizers with more entries: symbols behind those that are there, so that text is read as before.

A SentencePiece model gets them as user-defined pieces, which text is never split within; no other piece and no score changes. A
dictionary gets lines.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from dstrain.data.tokenizers.tokenizer import (
    WORD_START,
    DictionaryTokenizer,
    SentencePieceTokenizer,
    TokenizerPair,
)
from dstrain.data.tokenizers.training import check_symbols
from dstrain.errors import DataError
from dstrain.protocols import TextTokenizer


def grown_tokenizers(
    pair: TokenizerPair, *, tags: Sequence[str] = (), symbols: Sequence[str] = (), characters: Sequence[str] = ()
) -> TokenizerPair:
    """Both sides with `data.tokenizer.tags` and `user_symbols` more, and with those of the characters that a side lacks.

    DataError for a tag or symbol that is an entry already, is no symbol, or that the tokenizer would read otherwise, and for
    characters beside a dictionary.
    """
    check_symbols("--tags", tags)
    check_symbols("--symbols", symbols)

    def grown(side: TextTokenizer) -> TextTokenizer:
        return _grown(side, tags, [*symbols, *_unknown(side, [own for own in characters if own not in symbols])])

    source = grown(pair.source)
    return TokenizerPair(source, source if pair.shared else grown(pair.target))


def characters_of(lines: Iterable[str]) -> list[str]:
    """The characters of a text as SentencePiece normalizes them (NFKC), frequent ones first."""
    counts = Counter[str]()
    for line in lines:
        counts.update(unicodedata.normalize("NFKC", line))
    return sorted(counts, key=lambda character: (-counts[character], character))


def _unknown(tokenizer: TextTokenizer, characters: Sequence[str]) -> list[str]:
    """Those that are `<unk>`."""
    if characters and not isinstance(tokenizer, SentencePieceTokenizer):
        raise DataError(
            "--text: a dictionary has words or pieces, not characters; name what it lacks by --symbols or --tokenizer"
        )
    return [own for own, ids in zip(characters, tokenizer.encode(characters), strict=True) if tokenizer.unk_id in ids]


def _grown(tokenizer: TextTokenizer, tags: Sequence[str], symbols: Sequence[str]) -> TextTokenizer:
    known = set(tokenizer.tokens(range(tokenizer.vocab_size)))
    is_model = isinstance(tokenizer, SentencePieceTokenizer)
    names = [(symbol, symbol) for symbol in symbols] + [(tag, WORD_START + tag if is_model else tag) for tag in tags]
    for word, entry in names:
        if entry in known:
            raise DataError(f"{word!r} is an entry of the vocabulary already; leave it out of --tags and --symbols")
    entries = [entry for _, entry in names]
    grown: TextTokenizer
    match tokenizer:
        case SentencePieceTokenizer():
            grown = tokenizer.with_pieces(entries)
        case DictionaryTokenizer():
            grown = tokenizer.with_symbols(entries, tags=tags)
        case _:
            raise TypeError(f"{type(tokenizer).__name__} cannot grow")
    for tag, (_, entry), row in zip(tags, names[len(symbols) :], grown.encode(tags), strict=True):
        if entry not in grown.tokens(row):
            raise DataError(
                f"--tags: {tag!r} is read as {grown.tokens(row)}, as SentencePiece normalizes text; choose one that stays as it "
                "is"
            )
    return grown


def entry_rows(old: TextTokenizer, new: TextTokenizer) -> list[int | None]:
    """For each id of `new` the id of the same entry in `old`, None for an entry that `old` lacks.

    Entries are the same if all ids of `old` keep their names, else by their names. DataError if `new` lacks an entry of `old`, or
    a name stands for two.
    """
    before, after = old.tokens(range(old.vocab_size)), new.tokens(range(new.vocab_size))
    if after[: len(before)] == before:
        return [*range(len(before)), *[None] * (len(after) - len(before))]
    if repeated := [name for name, count in (Counter(before) + Counter(after)).items() if count > 2]:
        raise DataError(
            f"the entry {repeated[0]!r} occurs twice, and the new tokenizer numbers entries otherwise; keep the old ids"
        )
    if lacking := sorted(set(before) - set(after)):
        shown = ", ".join(map(repr, lacking[:5])) + ", ..." * (len(lacking) > 5)
        raise DataError(
            f"the new tokenizer lacks {len(lacking):,} of the bundle's {len(before):,} entries ({shown}); name one that has them "
            "all and some more"
        )
    number = {name: position for position, name in enumerate(before)}
    return [number.get(name) for name in after]
