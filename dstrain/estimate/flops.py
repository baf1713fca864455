"""Floating point operations of the matrix products of a micro-batch: two for each multiply-add, attention over all T x S scores.

Norms, activations and softmax count nothing, as in torch's FlopCounterMode. A backward pass makes two products for each one of
forward, one if the weight is frozen; the loss makes all its products in forward. A causal kernel computes half of the scores or
more, depending on its blocks: attention is an upper bound there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dstrain.estimate.loss import has_output_map, projection_dim
from dstrain.estimate.workload import MicroBatch, ParallelLayout, Workload
from dstrain.models.config import DecoderStackConfig, ModelConfig, StackConfig


@dataclass(frozen=True)
class Flops:
    """Of one micro-batch, of all ranks that share it. layers, attention: of forward, without attention's scores and of them.

    again: forward passes of layers that checkpointing repeats. outside: embeddings' and output maps, forward and backward.
    loss: products with the vocabulary matrix. teachers: forward, and their share of the loss.
    """

    layers: float
    attention: float
    again: float
    outside: float
    loss: float
    teachers: float
    trains_weights: bool = True

    @property
    def model(self) -> float:
        """Without what checkpointing repeats and without teachers: what is compared with a device's peak."""
        backward = 2 if self.trains_weights else 1
        return (1 + backward) * self.layers + 3 * self.attention + self.outside + self.loss

    @property
    def total(self) -> float:
        """All that is computed."""
        return self.model + self.again + self.teachers


def flops(workload: Workload, layout: ParallelLayout) -> Flops:
    """Of one micro-batch."""
    batch, model, trains = MicroBatch.of(workload, layout), workload.model, workload.adapter is None
    own = _stacks_flops(model, batch)
    scored, backward = batch.scored(workload), 3 if trains else 2
    projection = 2 * scored * workload.vocabulary.target * projection_dim(model)
    teachers = 0.0
    for teacher in workload.teachers:
        other = _stacks_flops(teacher.model, batch)
        teachers += other.linear + other.attention + _outside(teacher.model, batch, scored)
        teachers += 2 * scored * teacher.vocabulary.target * projection_dim(teacher.model)
    again = own.linear + own.attention if layout.checkpointing in ("full", "offload") else 0.0
    if layout.tiles > 1:
        again += own.feed_forward
    passes = workload.passes
    return Flops(
        layers=passes * own.linear,
        attention=passes * own.attention,
        again=passes * again,
        outside=passes * backward * _outside(model, batch, scored),
        loss=passes * backward * projection,
        teachers=teachers,
        trains_weights=trains,
    )


class _StackFlops(NamedTuple):
    """Of a forward pass of all layers. feed_forward: a part of `linear`."""

    linear: float
    attention: float
    feed_forward: float


def _stacks_flops(model: ModelConfig, batch: MicroBatch) -> _StackFlops:
    decoder = _layers(model.model_dim, model.decoder, batch, batch.target_tokens, batch.target)
    if model.kind == "decoder_only":
        return decoder
    encoder = _layers(model.model_dim, model.encoder, batch, batch.source_tokens, batch.source)
    return _StackFlops(*map(sum, zip(encoder, decoder, strict=True)))


def _layers(dim: int, stack: StackConfig, batch: MicroBatch, tokens: float, length: int) -> _StackFlops:
    share = (stack.num_kv_heads or stack.num_heads) / stack.num_heads
    feed_forward = 2 * tokens * dim * stack.ffn_dim * (3 if stack.feed_forward == "gated" else 2)
    linear = 2 * tokens * dim * (2 + 2 * share) * dim + feed_forward
    attention = 4 * batch.rows * length**2 * dim
    if isinstance(stack, DecoderStackConfig):
        cross = (stack.num_cross_kv_heads or stack.num_heads) / stack.num_heads
        linear += 2 * dim * dim * (2 * tokens + 2 * cross * batch.source_tokens)
        attention += 4 * batch.rows * length * batch.source * dim
    return _StackFlops(stack.depth * linear, stack.depth * attention, stack.depth * feed_forward)


def _outside(model: ModelConfig, batch: MicroBatch, scored: float) -> float:
    """Forward passes of the maps of factorized embeddings and of output widths."""
    embedding, dim, total = model.embedding, model.model_dim, 0.0
    if embedding.kind == "factorized":
        sides = {"source": batch.source_tokens, "target": batch.target_tokens}
        total += sum(2 * tokens * embedding.dim * dim for side, tokens in sides.items() if embedding.sides in ("both", side))
    if has_output_map(model):
        total += 2 * scored * dim * projection_dim(model)
    return total
