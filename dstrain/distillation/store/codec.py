"""From a teacher's logits to the values kept of them, and back to a `KeptSignal`; one codec a method.

`select` works on the teacher's device, chunk by chunk, and is all that the teacher waits for; `pack` makes the columns of a shard
of it, in numpy; `unpack` reads columns of any tokens, in pieces that are adjacent.

Sampling is systematic: the n draws of a token are the points (u + j) / n of its cumulative distribution, j = 0 .. n - 1, with one
u, uniform in (0, 1]. Each draw has the teacher's distribution, so counts / n is unbiased, and a count differs from its mean by
less than 1, so that the variance is at most that of independent draws (Carpenter, Clifford, Fearnhead 1999, "An improved particle
filter for non-linear problems"; the use of samples for distillation: Anshumann et al. 2025, "Sparse Logit Sampling"). u is a hash
of (seed, row, position): no draw depends on what else is in the batch.

The uint8 code of the top-k tokens: let d be a token's distance from the best in nats and r the greatest distance, rounded up
to an eighth of a nat, at most 31.875. Stored is round(255 sqrt(d / r)): fine for probable tokens. Decoded masses are scaled to
1 - tail. For r = 8 the code moves a probability by 0.8 % at d = 0.5, by 1.6 % at d = 2 and by 3.1 % at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dstrain.data.prepared.rows import id_dtype
from dstrain.distillation.store.manifest import DenseMethod, Method, SampleMethod, TopKMethod
from dstrain.ops.teacher_signal import KeptSignal, LogProbsSignal, SparseSignal
from dstrain.seeding import derive_seed
from dstrain.wire import sent

Array = npt.NDArray[Any]
SPAN_STEPS = 8
"""Steps of a nat in which the greatest distance is stored."""
LEAST_TAIL = np.float32(2.0**-24)
"""A mass that float32 does not distinguish from 0 next to 1; a mass of 0 would be infinitely far away for reverse_kl."""


class TokenKeys(NamedTuple):
    """Which tokens these are. examples: (n,) rows of the data; positions: (n,) in the target, from 0."""

    examples: Array
    positions: Array


class Column(NamedTuple):
    """One column of n tokens. values: items of all tokens one after another; widths: (n,) items of each."""

    values: Array
    widths: Array


class Codec(Protocol):
    """One method of keeping a distribution."""

    @property
    def columns(self) -> dict[str, np.dtype[Any]]:
        """Columns of a shard. The first has the same number of items for every token, `items_per_token`."""
        ...

    @property
    def items_per_token(self) -> int:
        """Of the first column."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """At most so many, for the size of shards."""
        ...

    def select(self, logits: Tensor, keys: TokenKeys) -> tuple[Tensor, ...]:
        """The kept values of some tokens. logits: (n, V) float32, divided by the temperature, overwritten -> (n, ...) each."""
        ...

    def is_whole(self, selected: Sequence[Array]) -> Array:
        """Which tokens have a distribution: logits that are no number, or infinite, have none. (n,) bool

        Computed from the result of `select`, as another pass over all logits would cost a tenth of a dump.
        """
        ...

    def pack(self, selected: Sequence[Array]) -> dict[str, Column]:
        """The columns of what `select` gave."""
        ...

    def unpack(self, columns: Mapping[str, Sequence[Array]], num_tokens: int) -> KeptSignal:
        """The signals of tokens whose items are adjacent in the pieces of `columns`, each of whole tokens."""
        ...


def build_codec(method: Method, vocab_size: int) -> Codec:
    """The codec of `method`."""
    match method:
        case SampleMethod():
            return SampleCodec(method, vocab_size)
        case TopKMethod():
            return TopKCodec(method, vocab_size)
        case DenseMethod():
            return DenseCodec(method, vocab_size)


class SampleCodec:
    """distinct, repeated: numbers of different draws of a token, and of repeated ones; ids: repeated first; counts: of these."""

    def __init__(self, method: SampleMethod, vocab_size: int) -> None:
        self._draws = method.draws
        self._vocab_size = vocab_size
        self._seed = method.seed
        number = np.dtype(np.uint8 if method.draws < 1 << 8 else np.uint16)
        self.columns = {"distinct": number, "repeated": number, "ids": id_dtype(vocab_size), "counts": number}
        self.items_per_token = 1
        widths = {name: dtype.itemsize for name, dtype in self.columns.items()}
        self.bytes_per_token = min(method.draws, vocab_size) * (widths["ids"] + widths["counts"]) + 2 * number.itemsize

    def select(self, logits: Tensor, keys: TokenKeys) -> tuple[Tensor, ...]:
        """The token of each draw, ascending. (n, V) -> (n, draws) int32"""
        cumulative = torch.softmax(logits, 1, out=logits).cumsum(1)  # (n, V)
        offsets = sent(torch.from_numpy(uniform_draws(self._seed, keys)), logits.device)[:, None]
        points = (torch.arange(self._draws, device=logits.device) + offsets) / self._draws  # (n, draws)
        drawn = torch.searchsorted(cumulative, points.to(cumulative.dtype) * cumulative[:, -1:], out_int32=True)
        return (drawn,)

    def is_whole(self, selected: Sequence[Array]) -> Array:
        """A sum that is NaN draws the entry after the last."""
        whole: Array = selected[0][:, -1] < self._vocab_size
        return whole

    def pack(self, selected: Sequence[Array]) -> dict[str, Column]:
        """Runs of equal draws become one id and, if longer than 1, a count."""
        (drawn,) = selected
        starts = np.ones(drawn.shape, np.bool_)
        np.not_equal(drawn[:, 1:], drawn[:, :-1], out=starts[:, 1:])
        counts = np.diff(np.flatnonzero(starts), append=starts.size)
        tokens = np.nonzero(starts)[0]
        distinct, repeated = (np.bincount(some, minlength=len(drawn)) for some in (tokens, tokens[counts > 1]))
        order = np.argsort(2 * tokens + (counts == 1), kind="stable")
        values = {
            "distinct": fixed_width(distinct),
            "repeated": fixed_width(repeated),
            "ids": Column(drawn[starts][order], distinct),
            "counts": Column(counts[counts > 1], repeated),
        }
        return {name: Column(values[name].values.astype(dtype), values[name].widths) for name, dtype in self.columns.items()}

    def unpack(self, columns: Mapping[str, Sequence[Array]], num_tokens: int) -> SparseSignal:
        """Probabilities are counts / draws; no tail."""
        whole = concatenate_columns(columns, self.columns)
        distinct = whole["distinct"]
        slots = np.arange(distinct.max(initial=1))
        used, many = (slots < whole[name][:, None] for name in ("distinct", "repeated"))  # (n, k)
        ids = np.full(used.shape, -1, np.int64)
        ids[used] = whole["ids"]
        counts = used.astype(np.float32)
        counts[many] = whole["counts"]
        probs = torch.from_numpy(counts / np.float32(self._draws))
        return SparseSignal(torch.from_numpy(ids), probs, torch.zeros(num_tokens), with_tail=False)


class TopKCodec:
    """ids, log_probs: of the k most probable tokens, best first; tail: mass of the others; span: see the head of this file."""

    def __init__(self, method: TopKMethod, vocab_size: int) -> None:
        self._k = method.k
        self._complete = method.k == vocab_size
        self._coded = method.dtype == "uint8"
        log_probs = np.dtype(method.dtype)
        self.columns = {"ids": id_dtype(vocab_size), "log_probs": log_probs, "tail": np.dtype(np.float32)}
        if self._coded:
            self.columns["span"] = np.dtype(np.uint8)
        self.items_per_token = self._k
        self.bytes_per_token = self._k * (self.columns["ids"].itemsize + log_probs.itemsize) + 8

    def select(self, logits: Tensor, keys: TokenKeys) -> tuple[Tensor, ...]:
        """ids (n, k) int32, log-probabilities (n, k), tail (n,)."""
        best, ids = logits.topk(self._k, dim=1)
        log_probs = best - logits.logsumexp(1, keepdim=True)
        tail = torch.zeros_like(best[:, 0]) if self._complete else (1 - log_probs.exp().sum(1)).clamp_min_(0)
        return ids.to(torch.int32), log_probs, tail

    def is_whole(self, selected: Sequence[Array]) -> Array:
        """By the most probable token."""
        whole: Array = np.isfinite(selected[1][:, 0])
        return whole

    def pack(self, selected: Sequence[Array]) -> dict[str, Column]:
        """As they are, or coded in 8 bits."""
        ids, log_probs, tail = selected
        parts = {"ids": ids, "log_probs": log_probs, "tail": tail}
        if self._coded:
            distance = log_probs[:, :1] - log_probs
            span = np.clip(np.ceil(distance[:, -1] * SPAN_STEPS), 1, 255)
            share = np.minimum(distance * SPAN_STEPS / span[:, None], 1)
            parts |= {"log_probs": np.rint(255 * np.sqrt(share)), "span": span}
        return {name: fixed_width(parts[name].astype(dtype)) for name, dtype in self.columns.items()}

    def unpack(self, columns: Mapping[str, Sequence[Array]], num_tokens: int) -> SparseSignal:
        """Masses scaled to 1 - tail, which rounding has moved; a tail that rounding has made 0 is `LEAST_TAIL`."""
        whole = concatenate_columns(columns, self.columns)
        stored, tail = whole["log_probs"].reshape(num_tokens, self._k), whole["tail"]
        if not self._complete:
            tail = np.maximum(tail, LEAST_TAIL)
        if self._coded:
            span = whole["span"].astype(np.float32)[:, None] / SPAN_STEPS
            probs = np.exp(-span * np.square(stored.astype(np.float32) / 255))
        else:
            probs = np.exp(stored, dtype=np.float32)
        probs *= ((1 - tail) / probs.sum(1))[:, None]
        ids = whole["ids"].reshape(num_tokens, self._k).astype(np.int64)
        rest = torch.from_numpy(np.array(tail, np.float32))
        return SparseSignal(torch.from_numpy(ids), torch.from_numpy(probs), rest)


class DenseCodec:
    """log_probs: of all vocabulary entries in the order of ids."""

    def __init__(self, method: DenseMethod, vocab_size: int) -> None:
        self._temperature = method.temperature
        self.columns = {"log_probs": np.dtype(np.float16)}
        self.items_per_token = vocab_size
        self.bytes_per_token = 2 * vocab_size

    def select(self, logits: Tensor, keys: TokenKeys) -> tuple[Tensor, ...]:
        """(n, V) float16, finite"""
        return (torch.log_softmax(logits, 1).clamp_min_(torch.finfo(torch.float16).min).half(),)

    def is_whole(self, selected: Sequence[Array]) -> Array:
        """By the most probable token."""
        whole: Array = np.isfinite(selected[0].max(1))
        return whole

    def pack(self, selected: Sequence[Array]) -> dict[str, Column]:
        """As they are."""
        return {"log_probs": fixed_width(selected[0])}

    def unpack(self, columns: Mapping[str, Sequence[Array]], num_tokens: int) -> LogProbsSignal:
        """The pieces as they are, without a copy."""
        return LogProbsSignal([piece.reshape(-1, self.items_per_token) for piece in columns["log_probs"]], self._temperature)


def concatenate_columns(columns: Mapping[str, Sequence[Array]], dtypes: Mapping[str, np.dtype[Any]]) -> dict[str, Array]:
    """Each column in one piece."""
    return {name: np.concatenate([np.empty(0, dtype), *columns[name]]) for name, dtype in dtypes.items()}


def fixed_width(values: Array) -> Column:
    """A column of equally many items a token. values: (n,) or (n, width)"""
    width = values[:1].size or 1
    return Column(values.reshape(-1), np.full(len(values), width))


def uniform_draws(seed: int, keys: TokenKeys) -> Array:
    """One number in (0, 1] a token, from its row and position only; (n,) float64.

    Two rounds of the finalizer of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """
    start = np.uint64(derive_seed(seed, "sampled logits"))
    mixed = _mix(_mix(start + keys.examples.astype(np.uint64) * _GOLDEN) + keys.positions.astype(np.uint64) * _GOLDEN)
    uniform: Array = ((mixed >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
    return uniform


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = x ^ (x >> np.uint64(31))
    return mixed
