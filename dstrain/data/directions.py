"""The tags of a direction as ids, in front of its sources.

Choice: tags become ids when data is prepared, so that lengths, plans, stores and selection by language count them like any token;
text stays raw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dstrain.data.config import Direction
from dstrain.data.tokenizers.tokenizer import WORD_START
from dstrain.errors import DataError

if TYPE_CHECKING:
    from dstrain.protocols import TextTokenizer


def source_tag_ids(name: str, direction: Direction, tokenizer: TextTokenizer) -> list[int]:
    """What stands in front of every source of a direction. Raises DataError for a tag that is no entry of the vocabulary."""
    tags = []
    for tag in direction.source_tags:
        (ids,) = tokenizer.encode([tag])
        pieces = tokenizer.tokens(ids)
        if tokenizer.unk_id in ids or not (len(ids) == 1 or (len(ids) == 2 and pieces[0] == WORD_START)):
            raise DataError(
                f"data.directions.{name}.source_tags: {tag!r} is no entry of the vocabulary, which reads it as {pieces}; name "
                "one that it has, or let data.tokenizer: {kind: sentencepiece} train a vocabulary with it"
            )
        tags += ids  # in some vocabularies a word start and the tag
    return tags
