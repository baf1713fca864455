"""Exchange between engines and checkpoints: fragments, the flat ranges of tensors of the training state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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


class StoredState(Protocol):
    """A checkpoint as an engine reads it. No call communicates. All raise CheckpointError if the checkpoint does not fit."""

    @property
    def path(self) -> Path:
        """Of the document that holds `scalars`, for messages."""
        ...

    @property
    def scalars(self) -> Mapping[str, Any]:
        """What `Resumable.scalars` gave."""
        ...

    def require(self, shapes: Mapping[str, tuple[int, ...]], *, optional: str) -> None:
        """Compare names and shapes of all tensors with those of this run. optional: a kind that is not compared."""
        ...

    def fill(self, fragments: Iterable[Fragment]) -> None:
        """Copy the stored values into `values` of each fragment."""
        ...

    def whole(self, kind: str) -> dict[str, Tensor]:
        """All tensors of a kind by name, without the kind."""
        ...
