"""What a rank sends and receives in one optimizer step, by collective.

ZeRO, over the replicas, with n elements on a rank and k micro-batches: stages 0 and 1 reduce n gradients once a step, stages 2
and 3 k times; stages 1 and 2 gather n updated parameters once; stage 3 gathers partitioned ones for every call of their modules,
in forward and in backward, and small ones, which it keeps whole, once. DeepSpeed's stages 1 and 2 reduce by all-reduces of whole
buckets, unless the file says otherwise.

Tensor parallelism, for each micro-batch: a sublayer sums once in forward, and once in backward for each map that reads a common
input; an embedding sums once, the loss once for the gradient of its features and twice a chunk for a few numbers a token.
Checkpointing in full repeats the sums of forward. Sequence parallelism exchanges q, k, v and the output of each attention, in
forward and in backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dstrain.estimate.loss import projection_dim
from dstrain.estimate.parameters import ParameterSizes, count_parameters
from dstrain.estimate.workload import ELEMENT_BYTES, MicroBatch, ParallelLayout, Workload, count_micro_batches
from dstrain.models.config import DecoderStackConfig, StackConfig

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
GroupName = Literal["world", "replicas", "tensor", "sequence"]


@dataclass(frozen=True)
class Transfer:
    """purpose: in words. bytes: in a step, of the whole tensors: summed, gathered, scattered, or exchanged by a rank."""

    purpose: str
    group: GroupName
    operation: Collective
    bytes: float

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends, by a ring over the group's ranks, and receives as many."""
        passes = 2 if self.operation == "all_reduce" else 1
        return passes * self.bytes * (ranks - 1) / ranks


def ranks_of(layout: ParallelLayout, group: GroupName) -> int:
    """Its ranks."""
    return {
        "world": layout.ranks,
        "replicas": layout.replicas,
        "tensor": layout.tensor,
        "sequence": layout.sequence,
    }[group]


def traffic(workload: Workload, layout: ParallelLayout, sizes: ParameterSizes) -> list[Transfer]:
    """The transfers of one step; none over a group of one rank."""
    every = [
        *_zero(workload, layout, sizes),
        *_tensor_parallel(workload, layout),
        *_sequence_parallel(workload, layout),
        *_teachers(workload, layout),
    ]
    return [transfer for transfer in every if transfer.bytes and ranks_of(layout, transfer.group) > 1]


def _zero(workload: Workload, layout: ParallelLayout, sizes: ParameterSizes) -> Iterator[Transfer]:
    sharding, width, count = layout.sharding, workload.element_bytes, count_micro_batches(workload, layout)
    gradients = sizes.trained * sharding.reduction_bytes
    if sharding.stage == 0:
        yield Transfer("gradients", "replicas", "all_reduce", gradients)
    elif sharding.stage == 3:
        small = sum(each.elements for each in sizes.each if each.elements <= sharding.persistent)
        gathered = count * workload.passes * _gathered(layout, sizes)
        yield Transfer("gradients", "replicas", "reduce_scatter", count * gradients)
        yield Transfer("parameters", "replicas", "all_gather", width * (gathered + small))
    else:
        operation: Collective = "all_reduce" if sharding.all_reduce else "reduce_scatter"
        yield Transfer("gradients", "replicas", operation, gradients * (count if sharding.stage == 2 else 1))
        yield Transfer("parameters", "replicas", "all_gather", width * sizes.trained)


def _gathered(layout: ParallelLayout, sizes: ParameterSizes) -> int:
    """Elements that stage 3 gathers for one micro-batch, at most: it keeps some where forward ends and backward begins.

    Each call of a module gathers its parameters, in forward, in backward, and in between if checkpointing calls it again; a model
    within the limits of what may stay is gathered once.
    """
    sharding, again = layout.sharding, layout.checkpointing != "none"
    large = [each for each in sizes.each if each.elements > sharding.persistent]
    if sum(each.elements for each in large) <= min(sharding.live, sharding.reuse):
        return sum(each.elements for each in large)
    return sum(each.elements * each.uses * (3 if again and each.in_layer else 2) for each in large)


def _tensor_parallel(workload: Workload, layout: ParallelLayout) -> Iterator[Transfer]:
    if layout.tensor == 1:
        return
    model, batch = workload.model, MicroBatch.of(workload, layout)
    count, passes = count_micro_batches(workload, layout), workload.passes
    forward = 2 if layout.checkpointing in ("full", "offload") else 1
    feed_forward = forward + (layout.tiles > 1)  # parts of the tokens run again in the backward pass
    maps = 1 if workload.adapter is None else 3  # separate projections sum their input's gradient each
    hidden = workload.element_bytes * model.model_dim / layout.sequence
    target, source = batch.target_tokens * hidden, batch.source_tokens * hidden
    layers = model.decoder.depth * target * (forward + feed_forward + maps + _up_maps(model.decoder, maps))
    if isinstance(model.decoder, DecoderStackConfig):
        layers += model.decoder.depth * (target * (forward + 1) + source * (1 if maps == 1 else 2))
    if model.kind == "encoder_decoder":
        layers += model.encoder.depth * source * (forward + feed_forward + maps + _up_maps(model.encoder, maps))
    yield Transfer("layers", "tensor", "all_reduce", count * passes * layers)
    embedding = model.embedding
    widths = {
        side: embedding.dim if embedding.kind == "factorized" and embedding.sides in ("both", side) else model.model_dim
        for side in ("source", "target")
    }
    tokens = batch.source_tokens * widths["source"] + batch.target_tokens * widths["target"]
    yield Transfer("embeddings", "tensor", "all_reduce", count * passes * tokens * workload.element_bytes / layout.sequence)
    scored = passes * batch.scored(workload) / layout.sequence
    yield Transfer("loss", "tensor", "all_reduce", count * scored * (4 * projection_dim(model) + 16))


def _up_maps(stack: StackConfig, maps: int) -> int:
    """Linear maps that read the input of a feed-forward network."""
    return 2 if maps > 1 and stack.feed_forward == "gated" else 1


def _sequence_parallel(workload: Workload, layout: ParallelLayout) -> Iterator[Transfer]:
    if layout.sequence == 1:
        return
    model, batch = workload.model, MicroBatch.of(workload, layout)
    hidden = workload.element_bytes * model.model_dim / layout.tensor / layout.sequence
    target, source = batch.target_tokens * hidden, batch.source_tokens * hidden

    def kv(heads: int | None, stack: StackConfig) -> float:
        """Of keys or values; heads fewer than the ranks are repeated."""
        return max(heads or stack.num_heads, layout.sequence * layout.tensor) / stack.num_heads

    total = model.decoder.depth * target * (2 + 2 * kv(model.decoder.num_kv_heads, model.decoder))
    if isinstance(model.decoder, DecoderStackConfig):
        total += model.decoder.depth * (2 * target + 2 * source * kv(model.decoder.num_cross_kv_heads, model.decoder))
    if model.kind == "encoder_decoder":
        total += model.encoder.depth * source * (2 + 2 * kv(model.encoder.num_kv_heads, model.encoder))
    passes = workload.passes * (3 if layout.checkpointing in ("full", "offload") else 2)
    yield Transfer("attention", "sequence", "all_to_all", count_micro_batches(workload, layout) * passes * total)


def _teachers(workload: Workload, layout: ParallelLayout) -> Iterator[Transfer]:
    for teacher in workload.teachers:
        if teacher.placement != "replicated":
            gathered = count_parameters(teacher.model, teacher.vocabulary).total * ELEMENT_BYTES[teacher.precision]
            yield Transfer("teacher", "world", "all_gather", math.ceil(count_micro_batches(workload, layout) * gathered))
