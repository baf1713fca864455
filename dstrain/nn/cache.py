"""Keys and values of past positions, by depth: a layer used at several depths has one entry for each.

Positions stand outermost in memory, so that the used part of a buffer is contiguous: appending writes one block, and choosing
rows (beams that continue others) is one copy of the used part into a spare buffer, which then changes places with the old one.
Memory: room for all depths plus one.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """The view of a `KeyValueCache` that one layer pass gets."""

    def __init__(self, buffer: Tensor, start: int) -> None:
        self._buffer = buffer  # (max, 2, N, H, K)
        self._start = start

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the next t positions. (N, H, t, K) each -> all so far, (N, H, start + t, K) each."""
        stop = self._start + keys.shape[2]
        self._buffer[self._start : stop, 0] = keys.permute(2, 0, 1, 3)
        self._buffer[self._start : stop, 1] = values.permute(2, 0, 1, 3)
        known = self._buffer[:stop].permute(1, 2, 3, 0, 4)  # (2, N, H, start + t, K)
        return known[0], known[1]


class KeyValueCache:
    """Room for `max_length` positions of `num_rows` rows at each of `depth` layer passes.

    keep_tokens: remember the tokens too, (N, length), for models that must compute everything anew at times.
    """

    def __init__(
        self,
        *,
        depth: int,
        num_rows: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        like: Tensor,
        keep_tokens: bool = False,
    ) -> None:
        self.length = 0
        self.tokens = torch.empty(num_rows, 0, dtype=torch.long, device=like.device) if keep_tokens else None
        self.num_rows = num_rows
        self._buffers = [like.new_empty(max_length, 2, num_rows, num_heads, head_dim) for _ in range(depth)]
        self._spare = torch.empty_like(self._buffers[0])

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._spare.device

    def at(self, depth: int) -> LayerCache:
        """What the layer pass number `depth` sees; all passes of a step see the same `length`."""
        return LayerCache(self._buffers[depth], self.length)

    def inputs(self, tokens: Tensor, moved: bool) -> Tensor:
        """What a step with these new tokens computes: them, or after a rewind all so far. (N, t) -> (N, t or length + t)

        moved: whether nothing computed before holds any more.
        """
        if self.tokens is not None:
            self.tokens = torch.cat([self.tokens, tokens], dim=1)
            if moved:
                self.length = 0
                return self.tokens
        return tokens

    def advance(self, num_positions: int) -> None:
        """All passes have appended `num_positions`."""
        self.length += num_positions

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was; their number may change. rows: (n,)"""
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, rows)
        if len(rows) != self.num_rows:
            self.num_rows = len(rows)
            max_length, _, _, num_heads, head_dim = self._spare.shape
            self._spare = self._spare.new_empty(max_length, 2, self.num_rows, num_heads, head_dim)
        for depth, buffer in enumerate(self._buffers):
            chosen = self._spare
            torch.index_select(buffer[: self.length], 2, rows, out=chosen[: self.length])
            self._buffers[depth] = chosen
            self._spare = buffer if buffer.shape == chosen.shape else torch.empty_like(chosen)


def is_identity(rows: Tensor) -> bool:
    """Whether `rows` is 0, 1, 2, ...; answers only where that needs no waiting for a GPU."""
    return rows.device.type == "cpu" and torch.equal(rows, torch.arange(len(rows)))
