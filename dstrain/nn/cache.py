"""Keys and values of past positions, by depth: a layer used at several depths has one entry for each.

Choosing rows (beams that continue others) costs only the changed entries: beams descend from a common one a few tokens
ago, and older entries are equal in all of them. So each row stores for each position the row that made its entry,
and only entries of other makers move. On a GPU, where counting these would mean waiting, and where the number of rows changes,
all are copied.

In a long cache the positions of a head follow one another in memory, as attention reads them (at 1,024 tokens 2.7 times as fast
as heads that do). In a short one the heads of a position do, so that the used part is one block, appending writes one piece a row
and a move is of whole positions; there this is up to 1.5 times as fast. The two meet at about 128 positions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.ops.cache_moves import CachedEntries
from dstrain.ops.cpu.attention import KEY_BLOCK
from dstrain.ops.kernels import CACHE_MOVES

LONG = 128
"""From so many positions on, those of a head follow one another in memory."""


class LayerCache:
    """The view of a `KeyValueCache` that one layer pass gets."""

    def __init__(self, buffer: Tensor, start: int) -> None:
        self._buffer = buffer  # (2, N, H, max, K), a view
        self._start = start

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the next t positions. (N, H, t, K) each -> all so far, (N, H, start + t, K) each."""
        stop = self._start + keys.shape[2]
        known = self._buffer[:, :, :, :stop]
        known[0, :, :, self._start :] = keys
        known[1, :, :, self._start :] = values
        return known[0], known[1]


class KeyValueCache:
    """Room for `max_length` positions, in whole blocks of keys, of `num_rows` rows at each of `depth` layer passes.

    keep_tokens: remember the tokens too, (N, length), for models that must recompute everything at times.
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
        self._finite = 0  # positions that hold numbers, of which those from `length` on mean nothing
        self.tokens = torch.empty(num_rows, 0, dtype=torch.long, device=like.device) if keep_tokens else None
        self.num_rows = num_rows
        max_length += -max_length % KEY_BLOCK
        self.buffers = [_empty_buffer(num_rows, num_heads, max_length, head_dim, like) for _ in range(depth)]
        self._known: list[tuple[Tensor, Tensor] | None] = [None] * depth  # what `put` returns, as long as it is the same memory
        self._makers = torch.empty(num_rows, max_length, dtype=torch.int32, device=like.device)
        self._rows = _numbers(self._makers)
        self._entries = CachedEntries(self.buffers)
        # Zeros, then what hides: shifted, the bias of any number of positions.
        self._end_bias = like.new_zeros(1, 1, 2 * max_length)
        self._end_bias[..., max_length:] = torch.finfo(like.dtype).min

    @property
    def device(self) -> torch.device:
        """Its device."""
        return self._makers.device

    def at(self, depth: int) -> LayerCache:
        """The cache of layer pass number `depth`; all passes of a step have the same `length`."""
        return LayerCache(self.buffers[depth], self.length)

    def put(self, depth: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the next position of layer pass number `depth`. (N, H, K) each -> keys and values of all whole blocks so far,
        (N * H, S, K) each, of which `block_bias` hides those that mean nothing.
        """
        buffer = self.buffers[depth]
        new_key, new_value = buffer.select(3, self.length).unbind(0)
        new_key.copy_(key)
        new_value.copy_(value)
        known = self._known[depth]
        if known is None:
            keys, values = buffer[:, :, :, : self._finite].flatten(1, 2)
            known = self._known[depth] = keys, values
        return known

    def block_bias(self, bias: Tensor | None) -> Tensor:
        """What a step of one position adds to the scores of `put`'s keys. bias: of all positions with the new one, broadcasts to
        (N, H of queries, 1, length + 1); None to see them all -> (1, 1, S) or (N * H of keys, queries of each, S).
        """
        length = self.length + 1
        self._fill_blocks(length)
        if bias is None:
            return self._end_bias.narrow(2, self._makers.shape[1] - length, self._finite)
        num_key_heads = self.buffers[0].shape[2]
        padded = F.pad(bias, (0, self._finite - length), value=torch.finfo(bias.dtype).min)
        num_heads = max(padded.shape[-3], num_key_heads)
        return padded.expand(self.num_rows, num_heads, 1, -1).reshape(self.num_rows * num_key_heads, -1, self._finite)

    def inputs(self, tokens: Tensor, moved: bool) -> Tensor:
        """The tokens that a step with these new ones computes: them, or after a rewind all so far. (N, t) -> (N, t or length + t)

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
        self._makers.narrow(1, self.length, num_positions).copy_(self._rows)
        self.length += num_positions

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was; their number may change. rows: (n,)"""
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, rows)
        used = self._makers[:, : self.length]
        if len(rows) == self.num_rows and self.device.type == "cpu":
            move = CACHE_MOVES.choose(self.device, self.buffers[0].dtype)
            if move(self._entries, used, rows):
                return
        makers = used.index_select(0, rows)
        self._copy(rows)
        self.num_rows = len(rows)
        self._makers = self._makers.new_empty(self.num_rows, self._makers.shape[1])
        self._makers[:, : self.length] = makers
        self._rows = _numbers(self._makers)

    def _fill_blocks(self, length: int) -> None:
        """Zeros from the end of what is known up to whole blocks of `length` positions: numbers, which a bias can hide."""
        stop = length + -length % KEY_BLOCK
        if stop > self._finite:
            for buffer in self.buffers:
                buffer[:, :, :, max(self._finite, self.length) : stop] = 0
            self._finite = stop
            self._known = [None] * len(self.buffers)

    def _copy(self, rows: Tensor) -> None:
        """All entries, into new buffers; each old one is freed before the next is copied."""
        self._entries = CachedEntries(self.buffers)  # lets go of the views of the old ones
        used = slice(max(self.length, self._finite))
        for depth, buffer in enumerate(self.buffers):
            _, _, num_heads, max_length, head_dim = buffer.shape
            chosen = _empty_buffer(len(rows), num_heads, max_length, head_dim, buffer)
            torch.index_select(buffer[:, :, :, used], 1, rows, out=chosen[:, :, :, used])
            self.buffers[depth], self._known[depth] = chosen, None


def _numbers(makers: Tensor) -> Tensor:
    """The number of each row. (N, length) -> (N, 1)"""
    return torch.arange(len(makers), dtype=makers.dtype, device=makers.device)[:, None]


def _empty_buffer(num_rows: int, num_heads: int, max_length: int, head_dim: int, like: Tensor) -> Tensor:
    """Keys and values of a layer pass, without initial values. (2, N, H, max, K)"""
    if max_length < LONG:
        return like.new_empty(max_length, 2, num_rows, num_heads, head_dim).permute(1, 2, 3, 0, 4)
    return like.new_empty(2, num_rows, num_heads, max_length, head_dim)


def is_identity(rows: Tensor) -> bool:
    """Whether `rows` is 0, 1, 2, ...; False without a look if that would wait for a GPU."""
    return rows.device.type == "cpu" and torch.equal(rows, _first_numbers(len(rows)))


@lru_cache(maxsize=256)
def _first_numbers(count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(count)
