"""Keys and values of past positions, by depth: a layer used at several depths has one entry for each.

One buffer, allocated once, holds all depths, so that reordering beams is a single copy of its used part.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """The view of a `KeyValueCache` that one layer pass gets."""

    def __init__(self, buffer: Tensor, start: int) -> None:
        self._buffer = buffer  # (2, N, H, max, K)
        self._start = start

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the next t positions. (N, H, t, K) each -> all so far, (N, H, start + t, K) each."""
        stop = self._start + keys.shape[2]
        self._buffer[0, :, :, self._start : stop] = keys
        self._buffer[1, :, :, self._start : stop] = values
        return self._buffer[0, :, :, :stop], self._buffer[1, :, :, :stop]


class KeyValueCache:
    """Room for `max_length` positions of `num_rows` rows at each of `depth` layer passes."""

    def __init__(self, *, depth: int, num_rows: int, num_heads: int, max_length: int, head_dim: int, like: Tensor) -> None:
        self.length = 0
        self._buffer = like.new_empty(depth, 2, num_rows, num_heads, max_length, head_dim)

    @property
    def num_rows(self) -> int:
        """Rows that it remembers now."""
        return self._buffer.shape[2]

    def at(self, depth: int) -> LayerCache:
        """What the layer pass number `depth` sees; all passes of a step see the same `length`."""
        return LayerCache(self._buffer[depth], self.length)

    def advance(self, num_positions: int) -> None:
        """All passes have appended `num_positions`."""
        self.length += num_positions

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was; fewer rows than before shrink the cache. rows: (n,)"""
        used = self._buffer[:, :, :, :, : self.length]
        if len(rows) == self.num_rows:
            used.copy_(used.index_select(2, rows))
        else:
            selected = self._buffer.new_empty(*self._buffer.shape[:2], len(rows), *self._buffer.shape[3:])
            selected[:, :, :, :, : self.length] = used.index_select(2, rows)
            self._buffer = selected


def is_identity(rows: Tensor) -> bool:
    """Whether `rows` is 0, 1, 2, ...; answers only where that needs no waiting for a GPU."""
    return rows.device.type == "cpu" and torch.equal(rows, torch.arange(len(rows)))
