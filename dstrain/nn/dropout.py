"""Dropout as a part of a layer: active in training only. Its masks are counted, not drawn.

A mask is a hash of (seed, step, pass, site in the model, example, position, feature), see `ops/random_bits.py`. So the loss
curve with dropout is the same for any number of ranks, micro-batches, tensor or sequence ranks, and what is computed again in the
backward pass has the same masks. `seed_masks` tells the step, `mask_pass` the pass, `Sequences.keys` example and position,
`MaskKeys.at` the site. If one is missing (a model used by hand, the attention of a GPU) torch's generator draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.batch import Sequences
from dstrain.ops.dropout import CountedMask
from dstrain.ops.kernels import DROPOUT
from dstrain.ops.random_bits import derived_keys
from dstrain.parallel.group import Group
from dstrain.seeding import derive_seed

EMBEDDING_SITE = -1
MEMORY_SITE = 1 << 20
"""Sites of a model beside its depths, 0, 1, ...: its embedding, and from there the depths that project the source."""


class _Now:
    """Where the process is. step_seed: None before the first `seed_masks`. masks: None outside of `MaskKeys.at`."""

    step_seed: ClassVar[int | None] = None
    number: ClassVar[int] = 0
    masks: ClassVar[_Masks | None] = None


def seed_masks(seed: int, step: int) -> None:
    """The masks of a step, the same on every rank. From here on until the next call."""
    _Now.step_seed = derive_seed(seed, "dropout", step)


@contextmanager
def mask_pass(number: int) -> Iterator[None]:
    """Other masks inside: of a further pass of the same examples in the same step, from 1."""
    before, _Now.number = _Now.number, number
    try:
        yield
    finally:
        _Now.number = before


class _Masks:
    """The masks of one site, one after another: they are asked for in the same order each time.

    keys: of all tokens. own: of those that this rank computes.
    """

    def __init__(self, keys: Tensor, own: Tensor, count: int = 0) -> None:
        self.keys = keys
        self.own = own
        self.count = count

    def next(self) -> Tensor:
        """Keys of the next mask, of all tokens."""
        self.count += 1
        return derived_keys(self.keys, self.count)

    def next_own(self) -> Tensor:
        """The same of the tokens that this rank computes."""
        self.count += 1
        return derived_keys(self.own, self.count)


@dataclass(frozen=True)
class MaskKeys:
    """What the tokens of a stack's input draw by. keys: of the tokens in this step and pass. seed: of the pass.

    Both None if torch's generator draws. own: the tokens that this rank computes, if other sequence ranks have the others.
    """

    keys: Tensor | None = None
    seed: int | None = None
    own: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def of(cls, sequences: Sequences) -> MaskKeys:
        """In the present step and pass."""
        if sequences.keys is None or _Now.step_seed is None:
            return cls()
        seed = derive_seed(_Now.step_seed, "pass", _Now.number)
        return cls(derived_keys(sequences.keys, seed), seed, sequences.own)

    @contextmanager
    def at(self, site: int) -> Iterator[None]:
        """Dropout inside is that of these tokens at this site of the model."""
        before = _Now.masks
        if self.keys is None:
            _Now.masks = None
        else:
            keys = derived_keys(self.keys, site)
            _Now.masks = _Masks(keys, keys[self.own])
        try:
            yield
        finally:
            _Now.masks = before

    def uniform(self, site: int, device: torch.device) -> Tensor:
        """One number in [0, 1) for all tokens, ()."""
        if self.seed is None:
            return torch.rand((), device=device)
        return torch.full((), derive_seed(self.seed, "layer", site) / 2**63, device=device)


NO_MASKS = MaskKeys()


def mask_keys() -> Tensor | None:
    """Keys of the next mask at this site, in the shape of the tokens; None outside of `MaskKeys.at`."""
    return None if _Now.masks is None else _Now.masks.next_own()


def runs_on_parts(run: Callable[[Tensor], Tensor], parts: int) -> list[Callable[[Tensor], Tensor]]:
    """`run` for each of so many parts of the tokens, (n, D), with the masks that these tokens have in a run on all of them."""
    masks = _Now.masks
    if masks is None:
        return [run] * parts
    first = masks.count

    def run_on_part(x: Tensor, *, keys: Tensor) -> Tensor:
        before, _Now.masks = _Now.masks, _Masks(keys, keys, first)
        try:
            return run(x)
        finally:
            masks.count, _Now.masks = _Now.masks.count, before

    return [partial(run_on_part, keys=keys) for keys in masks.own.flatten().tensor_split(parts)]


class AttentionDropout(NamedTuple):
    """Of the probabilities of an attention. mask_keys: (B, H, T) or (H, N), of each query; None if torch's generator draws."""

    p: float = 0.0
    mask_keys: Tensor | None = None


def attention_dropout(p: float, num_heads: int, *, heads: Group | None, sequence: Group | None = None) -> AttentionDropout:
    """Of all tokens. num_heads: of queries on this rank. heads: the tensor group that shares the heads; sequence: the ranks that
    share those of each of its ranks.
    """
    if p == 0 or _Now.masks is None:
        return AttentionDropout(p)
    keys = _Now.masks.next()
    part = 0 if heads is None else heads.rank
    first = (part if sequence is None else part * sequence.size + sequence.rank) * num_heads
    numbers = torch.arange(first, first + num_heads, device=keys.device).unsqueeze(-1)  # (H, 1)
    return AttentionDropout(p, derived_keys(keys.unsqueeze(-2), numbers))


class Dropout(nn.Module):
    """Inverted dropout with probability `p`. features: the tensor group if x is this rank's part of the features."""

    def __init__(self, p: float, *, features: Group | None = None) -> None:
        super().__init__()
        self.p = p
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        x, mask = self.split(x)
        return x if mask is None else DROPOUT.choose(x.device, x.dtype)(x, mask, None)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + forward(x)"""
        x, mask = self.split(x)
        return residual + x if mask is None else DROPOUT.choose(x.device, x.dtype)(x, mask, residual)

    def split(self, x: Tensor) -> tuple[Tensor, CountedMask | None]:
        """x, and the mask that is still to be applied: None if nothing is dropped, or torch's generator has drawn.

        x: (tokens, features), of which this rank may have a part.
        """
        if not self.training or self.p == 0:
            return x, None
        keys = mask_keys()
        if keys is None:
            return F.dropout(x, self.p), None
        return x, CountedMask(self.p, keys, 0 if self.features is None else self.features.rank * x.shape[-1])

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"
