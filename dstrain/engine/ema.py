"""An exponential moving average of the weights, on the device of the fp32 masters.

Each rank averages only the partition that it owns, so the average costs 4 bytes a parameter divided by the ranks and no
communication. It is swapped with the masters while it is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dstrain.engine.config import EmaConfig


class MovingAverage:
    """average <- d * average + (1 - d) * weights after each step; a plain copy of them until `start_step`.

    d = min(decay, (1 + t) / (10 + t)) at the t-th update, which follows from the step: a resumed average needs no counter.
    """

    def __init__(self, masters: Sequence[Tensor], config: EmaConfig) -> None:
        self.config = config
        self.tensors = [master.detach().clone() for master in masters]
        self._masters = masters

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after `step` completed steps."""
        weight = 1.0 - self.config.decay_after(step - self.config.start_step)
        for average, master in zip(self.tensors, self._masters, strict=True):
            average.lerp_(master.detach(), weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the masters; twice is the identity."""
        for average, master in zip(self.tensors, self._masters, strict=True):
            keep = master.detach().clone()
            master.copy_(average)
            average.copy_(keep)
