"""What tells a model the direction of a corpus, as ids: tags in front of its sources, the token that its decoder reads first.

Choice: tags become ids when data is prepared, so that lengths, plans, stores and selection by language count them like any token;
text stays raw. A start token is no part of a target: an example names it, and the decoder reads it instead of the end token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dstrain.data.config import DataConfig, Direction
from dstrain.data.sources.corpora import splits_of
from dstrain.data.tokenizers.tokenizer import WORD_START, TokenizerPair
from dstrain.errors import DataError

if TYPE_CHECKING:
    from dstrain.protocols import TextTokenizer


class DirectionIds(NamedTuple):
    """source_tags: in front of every source. start: what the decoder reads first; None = as the tokenizer says."""

    source_tags: tuple[int, ...] = ()
    start: int | None = None


def direction_ids(name: str, direction: Direction, tokenizers: TokenizerPair) -> DirectionIds:
    """The ids of a direction. Raises DataError for a token that is no entry of the vocabulary."""
    tags = [_ids_of(tag, f"{name}.source_tags", tokenizers.source) for tag in direction.source_tags]
    first = direction.start_token
    start = None if first is None else _ids_of(first, f"{name}.start_token", tokenizers.target)[-1]
    return DirectionIds(tuple(number for ids in tags for number in ids), start)


def directions_of(recipe: Mapping[str, Any] | None) -> dict[str, Direction]:
    """The directions of a bundle's recipe by name, those that have tokens of their own."""
    named = ((recipe or {}).get("data") or {}).get("directions") or {}
    return {name: Direction.model_validate(direction) for name, direction in named.items()}


def start_ids(config: DataConfig, split: str, tokenizers: TokenizerPair) -> Sequence[int | None]:
    """What the decoder reads first for each corpus of a split, in the order of the recipe; None = as the tokenizer says."""
    known = {name: direction_ids(name, direction, tokenizers).start for name, direction in config.directions.items()}
    return [None if corpus.name is None else known.get(corpus.name) for corpus in splits_of(config)[split]]


def _ids_of(word: str, key: str, tokenizer: TextTokenizer) -> list[int]:
    """The id of a word, which some vocabularies have behind a word start of its own."""
    (ids,) = tokenizer.encode([word])
    pieces = tokenizer.tokens(ids)
    if tokenizer.unk_id in ids or not (len(ids) == 1 or (len(ids) == 2 and pieces[0] == WORD_START)):
        raise DataError(
            f"data.directions.{key}: {word!r} is no entry of the vocabulary, which reads it as {pieces}; name "
            "one that it has, or let data.tokenizer: {kind: sentencepiece} train a vocabulary with it"
        )
    return ids
