"""Tensor parallelism: which part of a parameter a rank of the tensor group holds.

A linear map is cut by columns of its product (rows of its weight: each rank makes some outputs) or by rows (each rank reads some
inputs and the products are summed). Tables of tokens and the vocabulary projection are cut by vocabulary entries. Everything else
is replicated: the same on every rank of the group, with the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from dstrain.parallel.group import Group


class ParameterShard(NamedTuple):
    """The indices [start, stop) of the `size` indices of dimension `dim` of a whole parameter, or of a block of it."""

    dim: int
    start: int
    stop: int
    size: int


@runtime_checkable
class Sharded(Protocol):
    """A module that holds a rank's part of some of its parameters."""

    def shards(self) -> Mapping[str, ParameterShard]:
        """Its parameters that are cut, by their names in the module; a tied one is named by each module that has it."""
        ...


def group_size(group: Group | None) -> int:
    """Its ranks; None is a group of one."""
    return 1 if group is None else group.size


def even_shard(dim: int, size: int, group: Group) -> ParameterShard:
    """This rank's part of a dimension cut into equal parts. size: of the part."""
    return ParameterShard(dim, group.rank * size, (group.rank + 1) * size, group.size * size)


def vocabulary_shard(vocab_size: int, group: Group) -> ParameterShard:
    """This rank's vocabulary entries: equal numbers, but fewer on the last ranks if they do not divide. No entry is padding."""
    share = math.ceil(vocab_size / group.size)
    start = min(group.rank * share, vocab_size)
    return ParameterShard(0, start, min(start + share, vocab_size), vocab_size)
