"""A fragment: a flat range of one tensor of the training state, in which engines and checkpoints exchange it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DimensionSlice(NamedTuple):
    """The indices [start, stop) of dimension `dim`: the shard of a tensor-parallel rank."""

    dim: int
    start: int
    stop: int


class Fragment(NamedTuple):
    """A range of the tensor `name` = `{kind}/{parameter}`, such as `exp_avg/encoder.norm.weight`, with its values on this rank.

    shape: of the whole tensor. start: first element in the flattened tensor, or in its flattened slice. values: (n,) a view of
    what training works on, or a copy of it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    slice: DimensionSlice | None = None
