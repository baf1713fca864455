"""A bundle with more entries in its vocabulary, to train on toward a further language or task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dstrain.arguments import CheckedOptions, require_type
from dstrain.checkpoint.bundle import StoredBundle, find_bundle, save_bundle
from dstrain.checkpoint.directories import check_bundle_output, require_bundle
from dstrain.data.sources.opening import open_lines
from dstrain.data.sources.text import decode_line
from dstrain.data.tokenizers.growth import characters_of, entry_rows, grown_tokenizers
from dstrain.data.tokenizers.tokenizer import TokenizerPair, load_tokenizers
from dstrain.errors import ArgumentError, BundleError, DataError
from dstrain.models.config import VocabularySizes
from dstrain.models.grow import grown_weights
from dstrain.storage.outputs import check_output_path


@dataclass(frozen=True, kw_only=True)
class GrowOptions(CheckedOptions):
    """The options of `dstrain grow`.

    tags, symbols: entries to add, as `data.tokenizer.tags` and `user_symbols` are. text: a file in a new language; each character
    that the vocabulary lacks becomes a symbol. tokenizer: a tokenizer directory with all entries of the bundle's and more,
    instead of these. base: of an adapter bundle, if it has moved. overwrite: replace a bundle at
    `output`.
    """

    bundle: Path
    output: Path
    tags: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()
    text: Path | None = None
    tokenizer: Path | None = None
    base: Path | None = None
    overwrite: bool = False


class Growth(NamedTuple):
    """The sizes of the vocabulary before and after."""

    before: VocabularySizes
    after: VocabularySizes


def grow(options: GrowOptions) -> Growth:
    """Write the bundle, adapters merged, with the grown tokenizer. The recipe goes with it unchanged.

    ArgumentError unless there is one kind of growth, BundleError for a bundle that cannot be read or has no tokenizer, DataError
    for entries that cannot be added, StorageError if `output` exists, without `overwrite`.

    >>> from pathlib import Path
    >>> from dstrain.api import GrowOptions, grow
    >>> growth = grow(GrowOptions(bundle=Path("run/bundles/best"), output=Path("grown"), tags=("__pl__",)))
    >>> growth.after.source - growth.before.source
    1
    """
    require_type("options", options, GrowOptions)
    check_growth(options)
    stored = find_bundle(options.bundle, options.base)
    check_output_path(options.output, stored.sources)
    old = stored.tokenizers()
    if old is None:
        raise BundleError(f"{options.bundle} has no tokenizer, so its entries have no names; import the model with one")
    new = _grown(old, options)
    before, after = stored.description.vocabulary, VocabularySizes.of(new.source, new.target)
    _write(stored, old, new, options, after)
    return Growth(before, after)


def check_growth(options: GrowOptions) -> None:
    """Raise a DstrainError for every mistake in arguments and paths that shows before anything is loaded."""
    added = bool(options.tags or options.symbols or options.text)
    if added == (options.tokenizer is not None):
        raise ArgumentError(
            "--tags, --symbols and --text name entries, --tokenizer a directory that has them: give one of both"
            if added
            else "nothing is to be added: name entries by --tags, --symbols or --text, or a directory by --tokenizer"
        )
    require_bundle(options.bundle, options.base)
    check_bundle_output(options.output, {"BUNDLE": options.bundle}, overwrite=options.overwrite)


def _grown(old: TokenizerPair, options: GrowOptions) -> TokenizerPair:
    if options.tokenizer is None:
        characters = [] if options.text is None else characters_of(_lines(options.text))
        grown = grown_tokenizers(old, tags=options.tags, symbols=options.symbols, characters=characters)
        if grown.fingerprint == old.fingerprint:
            raise DataError(f"--text {options.text} has no character that the vocabulary lacks; add --tags or --symbols")
        return grown
    new = load_tokenizers(options.tokenizer)
    if new.shared != old.shared:
        one, two = ("one vocabulary for both sides", "one for each side")
        raise DataError(
            f"--tokenizer {options.tokenizer} has {one if new.shared else two}, the bundle {two if new.shared else one}; name a "
            "directory like the bundle's"
        )
    return new


def _lines(text: Path) -> Iterator[str]:
    with open_lines(str(text)) as stream:
        for number, line in enumerate(stream, 1):
            yield decode_line(line, str(text), number)


def _write(stored: StoredBundle, old: TokenizerPair, new: TokenizerPair, options: GrowOptions, after: VocabularySizes) -> None:
    rows = {"source": entry_rows(old.source, new.source), "target": entry_rows(old.target, new.target)}
    save_bundle(
        options.output,
        model_config=stored.description.model,
        vocabulary=after,
        weights=grown_weights(stored.description.model, after, stored, **rows),
        tokenizers=new,
        recipe=stored.recipe(),
        task=stored.task,
        notes={**stored.notes, "grown_from": str(options.bundle)},
        overwrite=options.overwrite,
    )
