"""Which positions of a batch are scored."""

import torch
from torch import Tensor

from dstrain.batch import IGNORE_INDEX


def scored_rows(labels: Tensor, num_targets: int) -> Tensor:
    """Indices of the labels that count. labels: (N,) with exactly `num_targets` not `IGNORE_INDEX` -> (num_targets,) int64.

    The number is known on the CPU beforehand, so nothing waits for a GPU.
    """
    return torch.nonzero_static(labels != IGNORE_INDEX, size=num_targets).squeeze(1)
