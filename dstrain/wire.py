"""How tensors of the CPU go to a GPU: through pinned memory, so that nothing waits, and in as few bytes as hold their values.

The tensors of a micro-batch share one buffer of 32-bit words, so that they are one copy. int64 tensors whose values fit travel as
int32, and are widened together on the device, where torch wants int64 for most indices; the rest travels as it is. The thread of
the loader fills the buffers, steps ahead: while a step computes, those of the next ones are ready.

Choice: the copy is launched on the stream that computes. It is small, and no second stream has to be joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

_ALIGNMENT = 4
"""Words that each tensor begins at a multiple of. Kernels are compiled for addresses of 16 bytes, and again for others."""
_INT32 = torch.iinfo(torch.int32)
_WORD = 4
"""Bytes of a word."""


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. From the CPU to a GPU it goes through pinned memory, so that nothing waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return _pinned(tensor).to(device, non_blocking=True)
    return tensor.to(device)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_pinned() else tensor.pin_memory()


class _Part(NamedTuple):
    """Where a tensor is in the buffer. start: of its words; of its elements in the widened part if it is narrow."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    is_narrow: bool

    def taken_from(self, words: Tensor, widened: Tensor) -> Tensor:
        """The tensor, a view. words: the buffer. widened: its narrow part as int64."""
        if self.is_narrow:
            return widened[self.start : self.start + self.shape.numel()].view(self.shape)
        count = self.shape.numel() * self.dtype.itemsize // _WORD
        return words[self.start : self.start + count].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class PinnedTensors:
    """Tensors in one pinned buffer. words: (w,) int32, of which the first `num_narrow` are the narrow tensors'."""

    words: Tensor
    num_narrow: int
    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Self:
        """Copies of tensors of the CPU, of 4 or 8 bytes an element. Taking pinned memory may wait for the GPU."""
        narrow = [_fits_int32(tensor) for tensor in tensors]
        order = sorted(range(len(tensors)), key=lambda index: not narrow[index])
        # None begins at 0, for which a compiler makes another graph than for all other offsets.
        end = num_narrow = _ALIGNMENT
        starts = dict.fromkeys(order, end)
        for index in order:
            starts[index] = end
            end += _aligned(tensors[index].numel() if narrow[index] else tensors[index].nbytes // _WORD)
            num_narrow = end if narrow[index] else num_narrow
        words = torch.zeros(end, dtype=torch.int32, pin_memory=True)
        for index, tensor in enumerate(tensors):
            values = tensor.flatten() if narrow[index] else tensor.flatten().view(torch.int32)
            words[starts[index] : starts[index] + len(values)].copy_(values)
        parts = (_Part(starts[index], each.shape, each.dtype, narrow[index]) for index, each in enumerate(tensors))
        return cls(words, num_narrow, tuple(parts))

    def to(self, device: torch.device) -> list[Tensor]:
        """The tensors on a GPU, in their order, with their dtypes: views of one copy, which is launched at once."""
        words = sent(self.words, device)
        widened = words[: self.num_narrow].long()
        return [part.taken_from(words, widened) for part in self.parts]


def _aligned(words: int) -> int:
    return -(-words // _ALIGNMENT) * _ALIGNMENT


def _fits_int32(tensor: Tensor) -> bool:
    if tensor.dtype != torch.int64:
        return False
    if tensor.numel() == 0:
        return True
    lowest, highest = tensor.aminmax()
    return bool(lowest >= _INT32.min and highest <= _INT32.max)
