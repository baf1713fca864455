"""Bytes of what stays on a rank through a step: parameters, gradients, optimizer state, moving average, buffers, teachers.

With N replicas and n elements on a rank (of its tensor slice), e bytes an element that computes and g one that adds up:

| stage | parameters | gradients | master weights | two moments |
|---|---|---|---|---|
| 0 | 4 n | 4 n | the parameters | 8 n |
| 1 | e n | g n | 4 n / N | 8 n / N |
| 2 | e n | g n / N | 4 n / N | 8 n / N |
| 3 | e n / N | g n / N | 4 n / N | 8 n / N |

Stages 1 and 2 pad each group of the optimizer to a multiple of 2 N elements, stage 3 each parameter to a multiple of N. Stage
2 in fp32 holds the gradient of a parameter whole that two partitions share, which is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dstrain.engine.ds_config import resolve_reader_config
from dstrain.estimate.parameters import ParameterSizes, count_parameters
from dstrain.estimate.workload import ELEMENT_BYTES, ParallelLayout, TeacherModel, Workload


@dataclass(frozen=True)
class States:
    """Bytes on the device of a rank. buffers: of reductions, and of gathered parameters. host: bytes in CPU memory of a GPU's
    rank, where states are offloaded."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    buffers: int
    teacher: int
    host: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return self.parameters + self.gradients + self.optimizer + self.ema + self.buffers + self.teacher


def states(workload: Workload, layout: ParallelLayout, sizes: ParameterSizes) -> States:
    """Of one rank, between the first optimizer step and the end. sizes: of the layout's tensor slice."""
    sharding, replicas, width = layout.sharding, layout.replicas, workload.element_bytes
    stage, trained = sharding.stage, _partitioned(workload, layout, sizes)
    share = trained // replicas if stage > 0 else trained
    frozen = sizes.total - sizes.trained
    if stage == 3:
        parameters = width * (share + sum(math.ceil(e.elements / replicas) for e in sizes.each if not e.is_trained))
    else:
        parameters = width * ((trained if stage else sizes.trained) + frozen)
    gradients = sharding.gradient_bytes * (share if stage >= 2 else sizes.trained)
    optimizer = (8 if stage == 0 else 12) * share
    ema = 4 * share if workload.ema else 0
    host = 0
    if sharding.offload_optimizer:
        host, optimizer, ema = optimizer + ema, 0, 0
        host += 4 * share
        gradients = gradients if stage == 1 or workload.precision == "bf16" else 0
    if sharding.offload_parameters:
        host, parameters = host + parameters, 0
    teachers = sum(teacher_bytes(teacher, layout.ranks) for teacher in workload.teachers)
    return States(parameters, gradients, optimizer, ema, _buffers(workload, layout, sizes), teachers, host)


def _partitioned(workload: Workload, layout: ParallelLayout, sizes: ParameterSizes) -> int:
    """Elements of the trained parameters with the padding of their partitions."""
    trained = [each for each in sizes.each if each.is_trained]
    if layout.sharding.stage == 0:
        return sizes.trained
    if layout.sharding.stage == 3:
        return layout.replicas * sum(math.ceil(each.elements / layout.replicas) for each in trained)
    kinds = (True, False) if workload.decay_groups else (None,)
    groups = [sum(each.elements for each in trained if kind in (None, each.is_matrix)) for kind in kinds]
    multiple = 2 * layout.replicas
    return sum(math.ceil(group / multiple) * multiple for group in groups)


def _buffers(workload: Workload, layout: ParallelLayout, sizes: ParameterSizes) -> int:
    """Reduction buffers, two if reductions overlap, and what stage 3 gathers.

    A CPU's memory holds of a buffer what is written, at most all gradients.
    """
    sharding = layout.sharding
    if sharding.stage == 0:
        return 0
    bucket = sharding.bucket if layout.device == "cuda" else min(sharding.bucket, sizes.trained)
    # stage 1 collects in the type in which gradients add up, the others in that of the network
    element = sharding.gradient_bytes if sharding.stage == 1 else sharding.reduction_bytes
    buckets = bucket * element * (2 if sharding.overlap and sharding.stage < 3 else 1)
    if sharding.stage < 3:
        return buckets
    live = min(sharding.live + sharding.prefetch, sizes.total)
    return buckets + workload.element_bytes * max(live, min(2 * sizes.largest_layer, sizes.total))


def teacher_bytes(teacher: TeacherModel, ranks: int) -> int:
    """On the device of each rank: a teacher has no tensor slices, all ranks share one copy."""
    sizes, element = count_parameters(teacher.model, teacher.vocabulary), ELEMENT_BYTES[teacher.precision]
    if teacher.placement == "replicated":
        return element * sizes.total
    zero = resolve_reader_config(teacher.precision, ranks=ranks, size=sizes.model_size, offload=None)["zero_optimization"]
    live = min(sizes.total, int(zero["stage3_max_live_parameters"] + zero["stage3_prefetch_bucket_size"]))
    own = 0 if teacher.placement == "offloaded" else sum(math.ceil(each.elements / ranks) for each in sizes.each)
    return element * (own + live)
