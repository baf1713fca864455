"""Which entries of a cache of keys and values change if rows continue others, and their move; see `nn/cache.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class _BlockLayout(NamedTuple):
    """Buffers as rows of what is adjacent in memory and of one position: of one head, or of all of them.

    corners: (2, H or 1, 1) row number of row 0 at position 0. of_row, of_position: row numbers from one to the next. blocks: by
    depth, a view.
    """

    corners: Tensor
    of_row: int
    of_position: int
    blocks: list[Tensor]


class CachedEntries:
    """Keys and values of all depths. buffers: (2, N, H, max, K) each, all alike."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self.buffers = buffers

    @cached_property
    def layout(self) -> _BlockLayout:
        """Of the buffers."""
        _, _, num_heads, _, head_dim = self.buffers[0].shape
        of_half, of_row, of_head, of_position, _ = self.buffers[0].stride()
        width, heads = (num_heads * head_dim, 1) if of_head == head_dim else (head_dim, num_heads)
        corners = (torch.arange(2)[:, None] * of_half + torch.arange(heads) * of_head) // width
        blocks = [buffer.as_strided((buffer.numel() // width, width), (width, 1)) for buffer in self.buffers]
        return _BlockLayout(corners[..., None], of_row // width, of_position // width, blocks)


def indexed_moves(entries: CachedEntries, makers: Tensor, rows: Tensor) -> bool:
    """Row i becomes what row `rows[i]` was. makers: (N, length) the row that made each entry, changed too; rows: (N,).

    False, and nothing is done, if so many entries would move that copying all is faster.
    """
    chosen = makers.index_select(0, rows)
    row, position = (chosen != makers).nonzero(as_tuple=True)
    if 2 * len(row) >= makers.numel():
        return False
    corners, of_row, of_position, blocks = entries.layout
    starts = corners + position * of_position  # (2, H or 1, P)
    targets, sources = (starts + row * of_row).flatten(), (starts + rows[row] * of_row).flatten()
    for block in blocks:
        block.index_copy_(0, targets, block.index_select(0, sources))
    makers.copy_(chosen)
    return True
