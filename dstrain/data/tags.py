"""Language tags: the symbol that begins every source sentence of a multilingual corpus, as ids of the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dstrain.data.prepared.dataset import Dataset
from dstrain.errors import DataError
from dstrain.protocols import TextTokenizer


def locate_tags(tags: Sequence[str], tokenizer: TextTokenizer, dataset: Dataset) -> int:
    """The position of the tag in the ids of every source sentence: 0, or 1 if the tokenizer puts a word start before it.

    Reads one id of every sentence. Raises DataError if a tag is not one symbol, a sentence begins with none of the tags or a
    tag begins no sentence.
    """
    encoded = tokenizer.encode(tags)
    prefix = encoded[0][:-1]
    for tag, ids in zip(tags, encoded, strict=True):
        if not ids or ids[:-1] != prefix or len(ids) > 2 or tokenizer.unk_id in ids:
            raise DataError(
                f"the language tag {tag!r} is no symbol of the source tokenizer, which reads it as {tokenizer.tokens(ids)}; name "
                "it in data.tokenizer.user_symbols and prepare again, or correct objective.selection.tags"
            )
    position, known = len(prefix), np.array([ids[-1] for ids in encoded])
    missing, row = set(known.tolist()), 0
    for column in dataset.source_column(position):
        unknown = ~np.isin(column, known)
        if unknown.any():
            number = row + int(np.argmax(unknown))
            start = tokenizer.tokens(dataset[number].source[: position + 1].tolist())
            raise DataError(
                f"sentence {number + 1} of the training data begins with {''.join(start)!r}, which is none of the language tags "
                f"{list(tags)}; add its tag to objective.selection.tags, or choose selection: {{kind: global}}"
            )
        missing -= set(column.tolist())
        row += len(column)
    if missing:
        tag = next(tag for tag, ids in zip(tags, encoded, strict=True) if ids[-1] in missing)
        raise DataError(f"no sentence of the training data begins with the language tag {tag!r}; remove it from the list of tags")
    return position
