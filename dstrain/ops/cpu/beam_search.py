"""Between two steps of the model, in C++ (`cpp/beam_search.cpp`): one call for what takes torch five to twenty."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from dstrain.ops.cache_moves import CachedEntries
from dstrain.ops.cpu.native import function


def native_best_continuations(log_probs: Tensor, totals: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `composed_best_continuations`; of equal continuations the first hypothesis' first token comes first."""
    log_probs, totals = log_probs.contiguous(), totals.contiguous()
    num_sentences, beam_size = totals.shape
    best = totals.new_empty(num_sentences, k)
    tokens, parents = totals.new_empty(2, num_sentences, k, dtype=torch.int64)
    inputs, sizes = (log_probs.data_ptr(), totals.data_ptr()), (num_sentences, beam_size, log_probs.shape[-1], k)
    _best_continuations()(*inputs, *sizes, best.data_ptr(), tokens.data_ptr(), parents.data_ptr(), torch.get_num_threads())
    return best, tokens, parents


def native_log_probs(logits: Tensor) -> Tensor:
    """As `log_probs`."""
    logits = logits.contiguous()
    _log_probabilities()(logits.data_ptr(), *logits.shape, torch.get_num_threads())
    return logits


def native_extension(tokens: Tensor, history: Tensor, rows: Tensor, last: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """As `indexed_extension`."""
    tokens, history, rows, last, totals = (each.contiguous() for each in (tokens, history, rows, last, totals))
    shape, length = last.shape, tokens.shape[2]
    longer, later = last.new_empty(*shape, length + 1), totals.new_empty(*shape, history.shape[2] + 1)
    pointers = (each.data_ptr() for each in (tokens, history, rows, last, totals, longer, later))
    _extend()(*pointers, len(rows), length, history.shape[2])
    return longer, later


def native_moves(entries: CachedEntries, makers: Tensor, rows: Tensor) -> bool:
    """As `indexed_moves`, however many move."""
    rows, buffer, depth = rows.contiguous(), entries.buffers[0], len(entries.buffers)
    size = buffer.element_size()
    _, num_rows, heads, _, head_dim = buffer.shape
    pointers = (c_void_p * depth)(*(each.data_ptr() for each in entries.buffers))
    steps = (c_int64 * 4)(*(step * size for step in buffer.stride()[:4]))
    of_makers = makers.data_ptr(), makers.stride(0)
    _move_entries()(
        pointers,
        depth,
        steps,
        heads,
        head_dim * size,
        *of_makers,
        rows.data_ptr(),
        num_rows,
        makers.shape[1],
        torch.get_num_threads(),
    )
    return True


@cache
def _log_probabilities() -> Callable[..., None]:
    return function("log_probabilities", c_void_p, *[c_int64] * 3)


@cache
def _best_continuations() -> Callable[..., None]:
    pointers, sizes = [c_void_p] * 3, [c_int64] * 4
    return function("best_continuations", c_void_p, c_void_p, *sizes, *pointers, c_int64)


@cache
def _extend() -> Callable[..., None]:
    return function("extend_hypotheses", *[c_void_p] * 7, *[c_int64] * 3)


@cache
def _move_entries() -> Callable[..., None]:
    buffers, makers = (c_void_p, c_int64, c_void_p, c_int64, c_int64), (c_void_p, c_int64)
    return function("move_entries", *buffers, *makers, c_void_p, *[c_int64] * 3)
