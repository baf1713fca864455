"""What flows through a model: padded sequences and the batch made of them. A batch is never a dict.

Everything is right-padded. Shapes: B batch, S source, T target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that is not scored: padding."""


class Size(NamedTuple):
    """How much a batch, a step or a split holds: its scored target tokens, and the sentences that they make up.

    A loss is a mean over one of the two; `Objective.denominator` says over which.
    """

    num_targets: int
    num_sentences: int


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. From the CPU to a GPU it goes through pinned memory, so that nothing waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Sequences:
    """Right-padded token sequences.

    tokens: (B, S) int64, padded with the tokenizer's pad id after `lengths`.
    lengths: (B,) int64, real tokens of each row; 0 for a row of padding alone.
    positions: (B, S) int64 or None; None means 0, 1, 2, ... from the left.
    segments: (B, S) int64 or None; tokens see one another only within a segment (packing); None means one segment a row.
    """

    tokens: Tensor
    lengths: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None

    def to(self, device: torch.device) -> Sequences:
        """The same sequences on `device`."""
        moved = {name: sent(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    source: what the encoder reads, ending in EOS; None for decoder-only models.
    target: what the decoder reads: EOS, then the target tokens without their final EOS.
    labels: (B, T) int64, the target tokens ending in EOS; `IGNORE_INDEX` at padding.
    num_targets: number of scored labels, known on the CPU. 0 for an empty micro-batch, which adds exactly zero.
    example_ids: (B,) int64, row numbers of the data set; always on the CPU, where rows are looked up.
    sampled: whether the targets are samples of the model that is trained, not those of the data; alike in a whole step. One that
    was cut has no EOS at its end.
    """

    source: Sequences | None
    target: Sequences
    labels: Tensor
    num_targets: int
    example_ids: Tensor
    sampled: bool = False

    @property
    def size(self) -> Size:
        """Its targets, and its rows, each of which is a sentence; none where nothing is scored."""
        return Size(self.num_targets, len(self.example_ids) if self.num_targets else 0)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, but for the example ids."""
        source = None if self.source is None else self.source.to(device)
        return replace(self, source=source, target=self.target.to(device), labels=sent(self.labels, device))
