"""Encoded pairs on their way from the workers to a shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Rows(NamedTuple):
    """Pairs one after another: ids of all sentences in a row, lengths of each with EOS, texts in evaluation splits.

    references: of each pair; None = its target text is the only one.
    """

    source: npt.NDArray[Any]
    source_lengths: npt.NDArray[np.int32]
    target: npt.NDArray[Any]
    target_lengths: npt.NDArray[np.int32]
    source_text: Sequence[str] | None = None
    target_text: Sequence[str] | None = None
    references: Sequence[Sequence[str]] | None = None


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that shards use for ids below `vocab_size`: uint16 if it fits, else int32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
