"""The report of one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, field

from dstrain.batch import Metrics


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, the same on every rank.

    step: number of the step, from 1. loss: nats, the step's loss_sum divided by `denominator`, which is num_targets where the
    loss is a mean over tokens. grad_norm: global L2 norm before clipping. learning_rate: the one this step used. skipped: the
    update was not applied (fp16 overflow). metrics: sums and counts by name, each over the micro-batches that report it.
    """

    step: int
    loss: float
    num_targets: int
    denominator: int
    grad_norm: float
    learning_rate: float
    skipped: bool = False
    metrics: Metrics[float] = field(default_factory=Metrics)
