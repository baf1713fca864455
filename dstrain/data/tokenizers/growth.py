"""Tokenizers with more entries: symbols behind those that are there, so that text is read as before.

A SentencePiece model gets them as user-defined pieces, which text is never split within; no other piece and no score changes. A
dictionary gets lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dstrain.data.tokenizers.tokenizer import (
    WORD_START,
    DictionaryTokenizer,
    SentencePieceTokenizer,
    TokenizerPair,
)
from dstrain.data.tokenizers.training import check_symbols
from dstrain.errors import DataError
from dstrain.protocols import TextTokenizer


def grown_tokenizers(pair: TokenizerPair, *, tags: Sequence[str] = (), symbols: Sequence[str] = ()) -> TokenizerPair:
    """Both sides with `data.tokenizer.tags` and `user_symbols` more.

    DataError for one that is an entry already, is no symbol, or that the tokenizer would read otherwise.
    """
    check_symbols("--tags", tags)
    check_symbols("--symbols", symbols)
    source = _grown(pair.source, tags, symbols)
    return TokenizerPair(source, source if pair.shared else _grown(pair.target, tags, symbols))


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
