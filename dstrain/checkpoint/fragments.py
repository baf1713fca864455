"""Index algebra of sharded tensors: which ranges of which stored fragments cover the ranges that a rank needs.

A fragment is a flat range of a tensor, or of a slice of it along one dimension (a tensor-parallel shard). Both are written as
runs: maximal ranges of consecutive elements of the flattened whole tensor. A whole tensor and a slice along dimension 0 are one
run; a slice along dimension 1 has one run per row. Readers and writers then meet in the coordinates of the whole tensor,
whatever the number of ranks, ZeRO stage or tensor size of either. Torch-free; no values are touched here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from dstrain.errors import CheckpointError
from dstrain.fragment import DimensionSlice


class ElementRun(NamedTuple):
    """`length` elements, from `start` of the flattened whole tensor on, which are those from `offset` of the fragment on."""

    start: int
    length: int
    offset: int


class Span(NamedTuple):
    """The elements of a fragment: [start, start + length) of the flattened tensor, or of its flattened slice.

    shape: of the whole tensor.
    """

    shape: tuple[int, ...]
    start: int
    length: int
    slice: DimensionSlice | None = None

    def runs(self) -> Iterator[ElementRun]:
        """The runs of the fragment, in ascending order. Raises CheckpointError if it leaves the tensor."""
        row, pitch, origin = self._rows()
        if self.start < 0 or self.length < 0 or self.start + self.length > (row * math.prod(self.shape) // pitch if pitch else 0):
            raise CheckpointError(f"the fragment {self} leaves its tensor")
        offset = 0
        while offset < self.length:
            number, column = divmod(self.start + offset, row)
            length = min(row - column, self.length - offset)
            yield ElementRun(number * pitch + origin + column, length, offset)
            offset += length

    def _rows(self) -> tuple[int, int, int]:
        """Length of one run of the full slice, distance from run to run, and start of the first."""
        if self.slice is None:
            whole = math.prod(self.shape)
            return whole, whole, 0
        dim, first, last = self.slice
        if not (0 <= dim < len(self.shape) and 0 <= first <= last <= self.shape[dim]):
            raise CheckpointError(f"the fragment {self} leaves its tensor")
        inner = math.prod(self.shape[dim + 1 :])
        return (last - first) * inner, self.shape[dim] * inner, first * inner


class Read(NamedTuple):
    """Copy `length` elements from `source_offset` of stored fragment number `source` to `offset` of the needed one."""

    source: int
    source_offset: int
    offset: int
    length: int


def plan_reads(name: str, needed: Span, stored: Sequence[Span]) -> list[Read]:
    """How to fill `needed` from the stored fragments of the tensor `name`.

    Raises CheckpointError if no fragment, or more than one, holds an element. Cost: n log n in the runs of `stored`.
    """
    if other := next((span.shape for span in stored if span.shape != needed.shape), None):
        raise CheckpointError(f"{name} was saved with shape {list(other)}, but this run needs {list(needed.shape)}")
    stored_runs = sorted((run, source) for source, span in enumerate(stored) for run in span.runs())
    for (before, _), (after, _) in pairwise(stored_runs):
        if before.start + before.length > after.start:
            raise CheckpointError(f"{name}: element {after.start} is stored twice")
    starts = [run.start for run, _ in stored_runs]
    reads = []
    for run in needed.runs():
        position, stop = run.start, run.start + run.length
        index = bisect_right(starts, position) - 1
        while position < stop:
            stored_run, source = stored_runs[index] if 0 <= index < len(stored_runs) else (ElementRun(0, 0, 0), 0)
            length = min(stored_run.start + stored_run.length, stop) - position
            if length <= 0 or position < stored_run.start:
                raise CheckpointError(f"{name}: element {position} is not stored")
            reads.append(Read(source, stored_run.offset + position - stored_run.start, run.offset + position - run.start, length))
            position, index = position + length, index + 1
    return reads
