"""Id lists as padded tensors, in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded tokens (B, S) and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    return torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.long), lengths


def batches_by_length(lengths: Sequence[int], rows: Iterable[int], max_tokens: int) -> list[list[int]]:
    """Split `rows` into batches of at most `max_tokens` padded tokens, the longest first; a longer row is a batch alone.

    lengths: of every row, by its number.
    """
    batches: list[list[int]] = []
    width = 0
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = lengths[row]
        batches[-1].append(row)
    return batches
