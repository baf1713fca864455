"""How long the examples of a split are, known without reading any: what plans and checks go by."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dstrain.data.batching.permutation import IntArray

Lengths = npt.NDArray[np.integer[Any]]
"""(N,) tokens of each example on one side, the final EOS included; any integer type, mapped from the disk or not."""
Side = Literal["source", "target", "source and target"]
"""Both as a decoder-only model reads them: as one sequence in which they share an EOS."""


class Longest(NamedTuple):
    """The longest example of a side: its row and its tokens."""

    row: int
    tokens: int


class ExampleLengths(Protocol):
    """Lengths of a split in every epoch; the final EOS of each side counts."""

    def __len__(self) -> int:
        """Examples of the split."""
        ...

    def of(self, epoch: int, rows: IntArray) -> tuple[Lengths, Lengths]:
        """Tokens of the sources of some rows, or as many as each has at most, and of their targets, exactly; (n,) each."""
        ...

    def longest(self, side: Side) -> Longest:
        """Of all rows, in any epoch."""
        ...

    def num_targets(self, epoch: int) -> int:
        """Target tokens of all rows."""
        ...


class StoredLengths:
    """Lengths that are the same in every epoch. source, target: (N,)."""

    def __init__(self, source: Lengths, target: Lengths) -> None:
        if len(source) != len(target):
            raise ValueError(f"lengths of {len(source)} sources and {len(target)} targets")
        self.source = source
        self.target = target

    def __len__(self) -> int:
        return len(self.target)

    def of(self, epoch: int, rows: IntArray) -> tuple[Lengths, Lengths]:
        """Both are exact."""
        return self.source[rows], self.target[rows]

    def longest(self, side: Side) -> Longest:
        """The first of the longest."""
        lengths = {"source": self.source, "target": self.target}.get(side)
        if lengths is None:
            lengths = np.add(self.source, self.target, dtype=np.int32) - 1
        row = int(lengths.argmax())
        return Longest(row, int(lengths[row]))

    def num_targets(self, epoch: int) -> int:
        """The same in every epoch."""
        return int(self.target.sum(dtype=np.int64))
