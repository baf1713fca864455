"""The time of a step from rates that the user states: a roofline, term by term.

Products take their FLOPs by the rate of large products. Everything else takes its bytes by the rate of memory: each byte that a
layer keeps moves some times (`PASSES`), the logits of a chunk some times more (`LOGIT_BYTES`), a chunk reads and writes the
weight's gradient, the optimizer reads and writes its state once. A micro-batch takes at least as long as the CPU needs to launch
its kernels. Transfers follow one another and the computation, except for ZeRO's if the DeepSpeed file overlaps them with the
backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dstrain.estimate.activations import activations
from dstrain.estimate.flops import Flops
from dstrain.estimate.loss import projection_dim
from dstrain.estimate.states import States
from dstrain.estimate.traffic import GroupName, Transfer, ranks_of
from dstrain.estimate.workload import Cluster, MicroBatch, ParallelLayout, Workload, count_micro_batches
from dstrain.ops.chunk_size import resolve_chunk_tokens

PASSES = 6
"""How often a kept byte moves: written and read in forward, read in backward, its gradient written once and read twice."""
LOGIT_BYTES = 40
"""Traffic of a logit in float32: its product, maximum, softmax, and two products with its gradient."""
OVERLAP = 0.5
"""Share of the computation behind which overlapping transfers hide."""
LAUNCHES_PER_LAYER, LAUNCH_SECONDS = 100, 7e-6
"""Kernels of a layer pass, forward and backward, and what a launch takes the CPU."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on a rank. communication: what nothing hides."""

    products: float
    elementwise: float
    optimizer: float
    communication: float
    launches: float

    @property
    def total(self) -> float:
        """The CPU launches while the GPU computes: the longer of both counts."""
        return max(self.products + self.elementwise, self.launches) + self.optimizer + self.communication


def step_time(
    workload: Workload,
    layout: ParallelLayout,
    cluster: Cluster,
    *,
    work: Flops,
    held: States,
    transfers: Sequence[Transfer],
) -> StepTime:
    """Of one step."""
    rates, count = cluster.rates, count_micro_batches(workload, layout)
    products = count * work.total / (layout.tensor * layout.sequence) / rates.gemm
    elementwise = count * _moved(workload, layout) / rates.memory
    optimizer = 2 * (held.optimizer + held.gradients) / rates.memory
    depth = workload.model.decoder.depth + (workload.model.encoder.depth if workload.model.kind == "encoder_decoder" else 0)
    again = 1.33 if layout.checkpointing in ("full", "offload") else 1.0
    launches = count * workload.passes * depth * LAUNCHES_PER_LAYER * again * LAUNCH_SECONDS
    zero = sum(_seconds(t, layout, cluster) for t in transfers if t.group == "replicas")
    others = sum(_seconds(t, layout, cluster) for t in transfers if t.group != "replicas")
    hidden = OVERLAP * max(products + elementwise, launches) if layout.sharding.overlap else 0.0
    return StepTime(products, elementwise, optimizer, others + max(0.0, zero - hidden), launches)


def _moved(workload: Workload, layout: ParallelLayout) -> float:
    """Bytes through the memory of a rank in a micro-batch, without operands of products."""
    plain = replace(layout, checkpointing="none")
    again = 4 / 3 if layout.checkpointing != "none" else 1.0
    scored = workload.passes * MicroBatch.of(workload, layout).scored(workload) / layout.sequence
    entries = workload.vocabulary.target / layout.tensor
    chunks = math.ceil(scored / resolve_chunk_tokens(workload.chunk_tokens, layout.device, math.ceil(entries)))
    weight = entries * projection_dim(workload.model)
    models = 1 + 2 * len(workload.teachers)  # a teacher's logits, and the divergence from them
    loss = LOGIT_BYTES * scored * entries * models + chunks * weight * (8 + 2 * workload.element_bytes)
    return PASSES * again * activations(workload, plain).kept + loss


def _seconds(transfer: Transfer, layout: ParallelLayout, cluster: Cluster) -> float:
    return transfer.sent(ranks_of(layout, transfer.group)) / _bandwidth(transfer.group, layout, cluster)


def _bandwidth(group: GroupName, layout: ParallelLayout, cluster: Cluster) -> float:
    """Of a rank in a group: ranks of a tensor group are neighbors, then come those of a sequence group.

    A ring over several nodes uses the links of all its ranks on a node.
    """
    rates = cluster.rates
    extent = {"tensor": layout.tensor, "sequence": layout.tensor * layout.sequence}.get(group, layout.ranks)
    if cluster.gpus_per_node % extent == 0:
        return rates.intra_node
    stride = {"replicas": layout.tensor, "sequence": layout.tensor}.get(group, 1)
    return min(rates.intra_node, rates.inter_node * max(1, cluster.gpus_per_node // stride))
