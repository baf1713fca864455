"""What the CPU reads of a step on a GPU: losses, metrics and the norm of the gradient, in one copy.

The CPU launches a step far ahead of the GPU. Each number that it reads makes it wait until the GPU has caught up, and then the
GPU waits for the next launch. So a step is read once: after its last backward pass, before its update. Choice: not later, though
a loss could be read while the next step runs. A step that is not finite must stop training before any weight has changed, and
what is read late would have to be told from what is new in reports, checkpoints and limits. Cost: the GPU idles once a step, for
as long as it takes to launch the first kernel of the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dstrain.engine.loss_totals import LossReducer, LossTotals, Total


class StepReading:
    """Reads a step when it is called. check: raises if the total of all ranks must not be learned from."""

    def __init__(self, totals: LossTotals, reduce: LossReducer, check: Callable[[Total], None]) -> None:
        self._totals = totals
        self._reduce = reduce
        self._check = check
        self._total: Total | None = None

    def __call__(self, norms: Tensor) -> Tensor:
        """The norms on the CPU. Collective; waits for the device, once."""
        own, numbers = self._totals.read(norms.reshape(-1))
        self._total = self._reduce(own)
        self._check(self._total)
        return torch.tensor(numbers, dtype=norms.dtype, device="cpu").view(norms.shape)

    @property
    def total(self) -> Total:
        """Of all ranks."""
        assert self._total is not None, "the update has read the step"
        return self._total


@contextmanager
def norms_read_by(optimizer: Any, stage: int, read: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a step of DeepSpeed's partitioning optimizer computes with norms that `read` has brought to the CPU.

    Left to itself it looks for values that are not finite in a pass of its own, which it reads, and then reads the norm at each
    use. Such values show in the norm as well, which the step refuses by the same rules.
    """
    if stage == 0:
        yield
        return
    changed: dict[str, Callable[..., Any]] = {"has_overflow": lambda *_args, **_options: False}
    if stage == 3:
        norms_of_groups = optimizer._get_norm_groups
        changed["_get_norm_groups"] = lambda: list(read(torch.stack(norms_of_groups())))
    else:
        norm = optimizer.scaled_global_norm
        changed["scaled_global_norm"] = lambda: read(norm())
    vars(optimizer).update(changed)
    try:
        yield
    finally:
        for name in changed:
            delattr(optimizer, name)
