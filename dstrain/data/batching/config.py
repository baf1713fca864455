"""How text for language models is packed into blocks. Torch-free."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from dstrain.config_base import Config


def _require_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error}); correct it, or escape a symbol by \\") from error
    return pattern


LinePattern = Annotated[str, AfterValidator(_require_expression)]
"""A regular expression for the beginning of a line."""


class PackingConfig(Config):
    """Blocks of several lines or documents take the place of lines in training.

    A document is what a corpus says (`document_start`), else a line. Documents come in random order, the lines of each in their
    own; a block holds one corpus, if they have names. The blocks are other ones in every epoch. A block is one example: a
    sentence to means over sentences. Validation reads line by line.
    """

    block_size: PositiveInt = Field(description="Most tokens of a block, the final EOS of each line included.")
    documents: Literal["cut", "complete_sentences", "complete_documents", "best_fit"] = Field(
        default="cut",
        description="cut = the documents one after another, cut every block_size tokens; complete_sentences = whole lines until "
        "the next does not fit; complete_documents = the same, but of one document only; best_fit = whole documents, the longest "
        "first, each where it leaves least room (Ding et al. 2024). What is longer than a block is cut.",
    )
    attention: Literal["document", "block"] = Field(
        default="document",
        description="What a token sees before it: its own document, as when the model is used, or the whole block.",
    )
