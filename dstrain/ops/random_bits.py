"""Random bits as a hash of counters: no generator, no state, the same on every device and for every layout (Salmon et al. 2011).

A *key* (int64) stands for a row of numbers, here a token; the bits of its feature j are a function of the key and of j. So a
rank that has some rows, or some features of them, draws what one process draws for those. The hash is two rounds of multiply and
shift-add, as in the finalizers of MurmurHash3 and SplitMix64; four features share a 64-bit word. On a CPU it takes two thirds of
the time of torch's generator.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

FEATURES_PER_WORD = 4

_WEYL = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed integer
FIRST_FACTOR = -4658895280553007687
SECOND_FACTOR = -7723592293110705685


def derived_keys(keys: Tensor, seed: int | Tensor) -> Tensor:
    """Independent keys for every seed. (...) -> (...), int64. seed: 64 bits, signed; a tensor broadcasts with the keys."""
    return _mixed(_mixed(torch.bitwise_xor(keys, seed)))


def random_bits(keys: Tensor, start: int, stop: int) -> Tensor:
    """16 bits each for the features `start` to `stop` of every key. (...) int64 -> (..., stop - start) int16, maybe a view."""
    first, last = start // FEATURES_PER_WORD, -(-stop // FEATURES_PER_WORD)
    words = _mixed(torch.bitwise_xor(keys.unsqueeze(-1), word_counters(first, last, keys.device)))  # (..., words)
    return words.view(torch.int16)[..., start - FEATURES_PER_WORD * first : stop - FEATURES_PER_WORD * first]


def word_counters(first: int, last: int, device: torch.device) -> Tensor:
    """One for each of the words `first` to `last` - 1, made once; in a compiled graph, which keeps nothing, every time."""
    counters = _hashed_counters if torch.compiler.is_compiling() else _kept_counters
    return counters(first, last, device)


@cache
def _kept_counters(first: int, last: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _hashed_counters(first, last, device)


def _hashed_counters(first: int, last: int, device: torch.device) -> Tensor:
    """Hashed: with a plain sequence some pairs of bits would agree too often."""
    return derived_keys(torch.arange(first + 1, last + 1, device=device) * _WEYL, 0)


def _mixed(words: Tensor) -> Tensor:
    """In place. The shifts are arithmetic and added: by xor the sign bit would always become 0."""
    words.mul_(FIRST_FACTOR).add_(words >> 32)
    return words.mul_(SECOND_FACTOR).add_(words >> 32)
