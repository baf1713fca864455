"""The best type of each row of scores; on the CPU through numpy, whose search is five to ten times as fast as torch's."""

from __future__ import annotations

import torch
from torch import Tensor


def row_argmax(scores: Tensor) -> Tensor:
    """Where the highest score stands, the first of equal ones. (n, V) -> (n, 1) int64; not recorded by autograd."""
    if scores.device.type == "cpu" and scores.dtype in {torch.float32, torch.float64}:
        return torch.from_numpy(scores.detach().numpy().argmax(1)).unsqueeze(1)
    return scores.argmax(1, keepdim=True)
