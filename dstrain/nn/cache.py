"""Keys and values of past positions, by depth: a layer used at several depths has one entry for each.

The positions of a head follow one another in memory, as attention reads them. Choosing rows (beams that continue others) costs
what has changed, not what is there: beams descend from a common one a few tokens ago, and whatever is older is the same in all of
them already. So each row knows at each position in which row its entry was made, and only entries of other makers move. On a GPU,
where counting these would mean waiting, and where most entries would move or the number of rows changes, all are copied.
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
        known = self._buffer[:, :, :, :stop]
        known[0, :, :, self._start :] = keys
        known[1, :, :, self._start :] = values
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
        self._buffers = [like.new_empty(2, num_rows, num_heads, max_length, head_dim) for _ in range(depth)]
        self._makers = torch.empty(num_rows, max_length, dtype=torch.int32, device=like.device)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._makers.device

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
        makers = torch.arange(self.num_rows, dtype=torch.int32, device=self.device)
        self._makers[:, self.length : self.length + num_positions] = makers[:, None]
        self.length += num_positions

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was; their number may change. rows: (n,)"""
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, rows)
        used = self._makers[:, : self.length]
        makers = used.index_select(0, rows)
        if len(rows) == self.num_rows and self.device.type == "cpu":
            row, position = (makers != used).nonzero(as_tuple=True)
            if 2 * len(row) < used.numel():
                self._move(rows, row, position)
                used.copy_(makers)
                return
        self._copy(rows)
        self.num_rows = len(rows)
        self._makers = self._makers.new_empty(self.num_rows, self._makers.shape[1])
        self._makers[:, : self.length] = makers

    def _move(self, rows: Tensor, row: Tensor, position: Tensor) -> None:
        """Some entries only: those at (`row`, `position`), (P,) each."""
        _, num_rows, num_heads, max_length, head_dim = self._buffers[0].shape
        halves, heads = torch.arange(2)[:, None, None] * num_rows * num_heads, torch.arange(num_heads)[:, None]
        places = (halves + heads + row * num_heads) * max_length + position  # (2, H, P)
        sources = (places + (rows[row] - row) * num_heads * max_length).flatten()
        places = places.flatten()
        for buffer in self._buffers:
            entries = buffer.view(-1, head_dim)
            entries.index_copy_(0, places, entries.index_select(0, sources))

    def _copy(self, rows: Tensor) -> None:
        """All entries, into new buffers."""
        for depth, buffer in enumerate(self._buffers):
            chosen = buffer.new_empty(2, len(rows), *buffer.shape[2:])
            used = slice(self.length)
            torch.index_select(buffer[:, :, :, used], 1, rows, out=chosen[:, :, :, used])
            self._buffers[depth] = chosen


def is_identity(rows: Tensor) -> bool:
    """Whether `rows` is 0, 1, 2, ...; answers only where that needs no waiting for a GPU."""
    return rows.device.type == "cpu" and torch.equal(rows, torch.arange(len(rows)))
