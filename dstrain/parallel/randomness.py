"""Random numbers under tensor parallelism: equal on all ranks of a group for replicated tensors, different for cut ones.

torch's generator is seeded alike on the ranks of a tensor group and draws what is replicated. What is cut draws from a second
stream, seeded by the rank: inside `shard_randomness` it takes the generator's place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from dstrain.parallel.group import Group
from dstrain.seeding import seed_everything

_STREAM: dict[str, Tensor] = {}
"""The state of the second stream by device type; absent until its first use after a seeding."""


def seed_ranks(seed: int, purpose: str, *numbers: int, tensor: Group) -> None:
    """Seed both streams: the first by the arguments of `seed_everything`, the second by the rank in `tensor` too."""
    if tensor.size > 1:
        _STREAM.clear()
        seed_everything(seed, f"{purpose} of a shard", *numbers, tensor.rank)
        _STREAM[tensor.device.type] = _state(tensor.device)
    seed_everything(seed, purpose, *numbers)


@contextmanager
def _stream(states: dict[str, Tensor]) -> Iterator[None]:
    now = dict(_STREAM)
    _STREAM.update(states)
    try:
        yield
    finally:
        _STREAM.update(now)


def saved_stream() -> AbstractContextManager[None]:
    """A context in which the second stream is where it was when this was called; afterwards it is where it was before."""
    return _stream(dict(_STREAM))


@contextmanager
def shard_randomness(group: Group | None, *, active: bool) -> Iterator[None]:
    """Draw from the second stream inside. Nothing changes for group None, or if not `active`."""
    if group is None or not active or group.device.type not in _STREAM:
        yield
        return
    kind, replicated = group.device.type, _state(group.device)
    _set_state(group.device, _STREAM[kind])
    try:
        yield
    finally:
        _STREAM[kind] = _state(group.device)
        _set_state(group.device, replicated)


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
