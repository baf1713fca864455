"""fairseq's `dict.txt`: its symbols by id, and the markers that a model has around its text."""

from __future__ import annotations

from dstrain.config_base import Config
from dstrain.data.sources.text import check_text
from dstrain.errors import DataError

SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")


class Markers(Config):
    """Symbols of a dictionary around every text that is not empty, such as the language tokens of multilingual models.

    before: in front of the text. after: behind it, in front of the end. end: ends a text in place of `</s>`. start: what a
    decoder reads first; None = the end. Before a generated text its markers are forced; text never shows them.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    end: str = "</s>"
    start: str | None = None


def parse_dictionary(content: bytes, name: str) -> tuple[list[str], dict[str, int]]:
    """The symbols by id, and the id that a symbol of text gets. The names of the specials are not text."""
    check_text(name, content, 0)
    text = content.decode("utf-8-sig")  # an editor may have put a byte order mark before the most frequent symbol
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
