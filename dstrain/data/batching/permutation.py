"""A random order of n things that is computed where it is needed, not stored.

Choice: a Feistel network over a grid of rows x columns, near-square, with at least n cells. A round adds to one coordinate,
modulo its size, a random number that the other coordinate looks up in a table; this can be undone, so the network is a
bijection of the grid. A cell outside 0..n-1 is sent through again until it lands inside ("cycle walking"), which leaves a
bijection of 0..n-1. Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), generalized Feistel.

Cost: tables of 8 sqrt(n) numbers and about 40 ns an element; any part of the order is had without the rest. The tables are
raw bits of PCG64, which numpy promises to keep; its distributions carry no such promise.
"""

from math import isqrt

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_DOUBLE_ROUNDS = 4


class Permutation:
    """A bijection of 0..size-1 drawn by `seed`: index -> element."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._rows = isqrt(max(size - 1, 0)) + 1
        self._columns = max(-(-size // self._rows), 1)
        bits = np.random.PCG64(seed)

        def table(length: int, bound: int) -> IntArray:
            return (bits.random_raw(length) % np.uint64(bound)).astype(np.int64)

        self._rounds = [(table(self._columns, self._rows), table(self._rows, self._columns)) for _ in range(_DOUBLE_ROUNDS)]

    def elements(self, start: int, stop: int) -> IntArray:
        """The elements at indices start..stop-1; (stop - start,) int64."""
        return self.of(np.arange(start, stop))

    def of(self, indices: IntArray) -> IntArray:
        """The elements at any indices; (n,) -> (n,)"""
        cells = self._shuffle(indices)
        outside = np.flatnonzero(cells >= self.size)
        while outside.size:
            cells[outside] = self._shuffle(cells[outside])
            outside = outside[cells[outside] >= self.size]
        return cells

    def _shuffle(self, cells: IntArray) -> IntArray:
        row, column = np.divmod(cells, self._columns)
        for by_column, by_row in self._rounds:
            row += by_column[column]
            row -= self._rows * (row >= self._rows)
            column += by_row[row]
            column -= self._columns * (column >= self._columns)
        return row * self._columns + column
