"""Bytes that a forward pass keeps for the backward pass, each storage once, by reading what every operation of a layer saves.

    sublayer         its input, the input of its norm with the norm's statistics, the mask of its dropout
    self-attention   q, k, v (one storage), q and k again if they are rotated, the output, a logsumexp a head
    cross-attention  q, k and v of the source, the output, a logsumexp a head; the encoder's output once
    feed-forward     what the activation and the down-projection read; gated: both halves, the activated one, the product

Tensor parallelism divides what lies between two linear maps of a sublayer; sequence parallelism divides all tokens. An adapter's
own activations, of its rank's few features, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dstrain.estimate.kernels import AttentionKernel, Kernels
from dstrain.estimate.loss import has_output_map
from dstrain.estimate.workload import MicroBatch, ParallelLayout, Workload
from dstrain.models.config import DecoderOnlyConfig, DecoderStackConfig, EncoderDecoderConfig, StackConfig
from dstrain.models.position_config import RotaryPosition

_KEEP_RESULT = {"relu", "tanh"}
"""Activations whose gradient needs the result, which the next operation keeps anyway; the others keep their input."""


@dataclass(frozen=True)
class Activations:
    """Bytes on a rank. kept: from forward to backward. recomputed: of the layer that is computed again, under checkpointing.

    host: kept in CPU memory. backward: gradients and temporaries of the layer whose backward pass needs most.
    """

    kept: float
    recomputed: float
    backward: float
    host: float = 0.0

    @property
    def peak(self) -> float:
        """While the last layers run backward."""
        return self.kept + self.recomputed


@dataclass(frozen=True)
class _Stack:
    """One stack under one layout. length, tokens: of its sequences; source, source_tokens: of those that cross-attention reads, 0
    without. Results are
    bytes of all rows, before a sequence group shares the tokens."""

    parts: EncoderDecoderConfig | DecoderOnlyConfig
    stack: StackConfig
    kernels: Kernels
    tensor: int
    sequence: int
    element: int
    rows: float
    length: int
    source: int
    tokens: float
    source_tokens: float
    rotary: bool
    alibi: bool
    checkpointed: bool
    packed: bool
    tiles: int

    @property
    def width(self) -> float:
        """Bytes of a hidden state of every token."""
        return self.tokens * self.parts.model_dim * self.element

    def norm(self, *, with_input: bool = True) -> float:
        """Input and statistics of a norm."""
        if self.parts.norm.kind == "layer_norm":
            return self.width * with_input + 2 * self.kernels.statistic_bytes * self.tokens
        if self.kernels.has_fused_rms_norm:
            return self.width * with_input + 4 * self.tokens
        return self.tokens * (8 * self.parts.model_dim + 4)

    def mask(self, probability: float, features: float) -> float:
        return self.tokens * features * self.kernels.mask_bytes if probability > 0 else 0.0

    def sublayer(self) -> float:
        """What surrounds each: its input, its norm, the dropout of its output."""
        return self.width + self.norm() + self.mask(self.parts.dropout, self.parts.model_dim)

    def attention(self, *, kv_heads: int, keys: int, projected: float, rotated: float) -> float:
        """Of one attention. keys: length of the sequences that are read. projected: bytes of q, k and v where they are made;
        rotated: of those that are kept beside them."""
        heads, dim, e = self.stack.num_heads / self.tensor, self.parts.model_dim / self.tensor, self.element
        probabilities = self.tokens * keys * heads
        kernel = self.kernel(kv_heads, keys)
        # the output of rotated heads or of padded rows, and what an exchange of heads returns, are copied where heads are merged
        in_rows = self.packed and self.kernels.device == "cpu"  # packed sequences become padded rows for a CPU's kernels
        copies = 2 if self.sequence > 1 or (kernel == "fused" and (in_rows or (rotated and not self.packed))) else 1
        rotated = 0.0 if in_rows or self.sequence > 1 else rotated  # copies take the place of what is projected
        output = self.tokens * dim * e * copies
        match kernel:
            case "fused":
                return projected + rotated + output + 4 * self.tokens * heads
            case "native":  # probabilities of whole vectors of queries
                return projected + rotated + output + 4 * probabilities * (self.length + -self.length % 16) / self.length
            case "batched_products":
                return 4 * dim * (self.tokens + 2 * self.rows * keys) + 4 * probabilities + output
            case "composite":
                return 4 * dim * (self.tokens + 2 * self.rows * keys) + 12 * probabilities + output

    def kernel(self, kv_heads: int, keys: int) -> AttentionKernel:
        return self.kernels.attention(
            queries=self.length,
            keys=keys,
            grouped=kv_heads != self.stack.num_heads,
            dropout=self.parts.attention_dropout,
        )

    def self_attention(self) -> float:
        kv_heads = self.stack.num_kv_heads or self.stack.num_heads
        share = kv_heads / self.stack.num_heads
        one = self.width / self.tensor
        rotated = (1 + share) * one if self.rotary else 0.0
        return self.attention(kv_heads=kv_heads, keys=self.length, projected=(1 + 2 * share) * one, rotated=rotated)

    def cross_attention(self, stack: DecoderStackConfig) -> float:
        kv_heads = stack.num_cross_kv_heads or stack.num_heads
        source = self.source_tokens * self.parts.model_dim * self.element / self.tensor
        projected = self.width / self.tensor + 2 * source * kv_heads / stack.num_heads
        return self.attention(kv_heads=kv_heads, keys=self.source, projected=projected, rotated=0.0)

    @property
    def inner(self) -> float:
        """Bytes of the inner features of a feed-forward network."""
        return self.tokens * self.stack.ffn_dim / self.tensor * self.element

    def feed_forward(self) -> float:
        inner, dropout = self.inner, self.parts.activation_dropout
        mask = self.mask(dropout, self.stack.ffn_dim / self.tensor)
        is_linear, keeps_result = self.parts.activation == "linear", self.parts.activation in _KEEP_RESULT
        if self.stack.feed_forward == "gated":
            return (3 if is_linear else 4) * inner + mask
        if is_linear:
            return inner + mask
        return inner * (1 if keeps_result and not dropout else 2) + mask

    def layer(self) -> float:
        """All that a layer pass keeps without checkpointing; a network that runs on parts keeps its input only."""
        total = 2 * self.sublayer() + self.self_attention() + (self.feed_forward() if self.tiles == 1 else 0.0)
        if isinstance(self.stack, DecoderStackConfig):
            total += self.sublayer() + self.cross_attention(self.stack)
        return total

    def tile(self) -> float:
        """Of a part of the tokens, whose feed-forward network runs again in the backward pass."""
        return self.feed_forward() / self.tiles if self.tiles > 1 else 0.0

    def products(self) -> float:
        """What `selective` keeps of a layer pass: its input, and results of matrix products, attention and collectives."""
        stack, sums = self.stack, 2 if self.tensor > 1 else 1  # a product of cut inputs, and its sum over the ranks
        share = (stack.num_kv_heads or stack.num_heads) / stack.num_heads
        up = (2 if stack.feed_forward == "gated" else 1) * self.inner
        total = self.width + (1 + 2 * share) * self.width / self.tensor + up + 2 * sums * self.width
        total += self._attention_results(stack.num_kv_heads, self.length)
        if isinstance(stack, DecoderStackConfig):
            cross = (stack.num_cross_kv_heads or stack.num_heads) / stack.num_heads
            source = self.source_tokens * self.parts.model_dim * self.element
            total += (self.width + 2 * cross * source) / self.tensor + sums * self.width
            total += self._attention_results(stack.num_cross_kv_heads, self.source)
        return total

    def _attention_results(self, kv_heads: int | None, keys: int) -> float:
        if self.kernel(kv_heads or self.stack.num_heads, keys) != "fused":
            return 0.0
        return self.width / self.tensor + 4 * self.tokens * self.stack.num_heads / self.tensor

    def backward(self) -> float:
        """Gradients beside what a layer keeps: of the feed-forward network, its output, input and inner features; or later of
        attention, if its kernel writes scores."""
        heads, dim = self.stack.num_heads / self.tensor, self.parts.model_dim / self.tensor
        gradients = 2 * self.width + 2 * self.inner / self.tiles
        kernel = self.kernel(self.stack.num_kv_heads or self.stack.num_heads, self.length)
        if kernel == "fused":
            return gradients
        scores = 4 * self.tokens * (heads * max(self.length, self.source) * (kernel != "native") + 4 * dim)
        return max(gradients, scores - (self.feed_forward() if self.tiles == 1 else 0.0))

    def bias(self, *, causal: bool, padded: bool) -> float:
        """What is added to attention scores, if a kernel or a layer's second pass needs it; and the tables of rotation."""
        kernel = self.kernel(self.stack.num_kv_heads or self.stack.num_heads, self.length)
        if kernel in {"native", "batched_products"} and not self.checkpointed:
            return self.rotary_tables()
        if self.packed and self.kernels.device == "cuda":
            return self.rotary_tables()
        if self.alibi:
            rows = self.rows if padded and not causal else 1
            return rows * self.stack.num_heads / self.tensor * self.length**2 * self.element
        return self.rotary_tables() + (self.tokens * self.element if padded and not causal else 0.0)

    def rotary_tables(self) -> float:
        """Cosines and sines of a pair of features at each position, up to a power of two."""
        if not isinstance(self.parts.position, RotaryPosition):
            return 0.0
        rotated = self.parts.position.rotated_features(self.parts.model_dim // self.stack.num_heads)
        return max(256, 1 << (self.length - 1).bit_length()) * rotated * self.element

    def embedding(self, side: Literal["source", "target"]) -> float:
        """Token ids, what a factorized table keeps, the norm and the dropout."""
        config = self.parts.embedding
        total = 8 * self.tokens + (self.tokens if self.tensor > 1 else 0)  # and which ids are of this rank
        if config.kind == "factorized" and config.sides in ("both", side):
            copies = 1 if config.activation == "linear" or config.activation in _KEEP_RESULT else 2
            total += copies * self.tokens * config.dim * self.element
        if config.norm:
            total += self.norm()
        return total + self.mask(self.parts.dropout, self.parts.model_dim)

    def has_final_norm(self) -> bool:
        return self.stack.final_norm == "yes" or (self.stack.final_norm == "auto" and self.parts.norm_order == "pre")


def activations(workload: Workload, layout: ParallelLayout, *, padded: bool = True) -> Activations:
    """Of one micro-batch on a rank. padded: whether rows have padding, which encoders then hide by a bias."""
    batch = MicroBatch.of(workload, layout)
    stacks, pairs = _stacks(workload, layout, batch), []
    outside = _outside(workload, batch, stacks, padded=padded)
    for stack in stacks:
        layer, depth = stack.layer(), stack.stack.depth
        match layout.checkpointing:
            case "none":
                pairs.append((depth * layer, 0.0, 0.0))
            case "selective":
                pairs.append((depth * stack.products(), max(0.0, layer - stack.products()), 0.0))
            case "full":
                pairs.append((depth * stack.width, layer, 0.0))
            case "offload":
                pairs.append((0.0, layer, depth * stack.width))
    share = workload.passes / layout.sequence
    return Activations(
        kept=share * (outside + sum(kept for kept, _, _ in pairs)),
        recomputed=max(again + stack.tile() for (_, again, _), stack in zip(pairs, stacks, strict=True)) / layout.sequence,
        backward=max(stack.backward() for stack in stacks) / layout.sequence,
        host=share * sum(host for _, _, host in pairs),
    )


def _stacks(workload: Workload, layout: ParallelLayout, batch: MicroBatch) -> list[_Stack]:
    model, kernels = workload.model, Kernels(layout.device, workload.precision)

    def stack(config: StackConfig, length: int, tokens: float, alibi: bool, *, reads: bool = False) -> _Stack:
        return _Stack(
            parts=model,
            stack=config,
            kernels=kernels,
            tensor=layout.tensor,
            sequence=layout.sequence,
            element=workload.element_bytes,
            rows=batch.rows,
            length=length,
            source=batch.source if reads else 0,
            tokens=tokens,
            source_tokens=batch.source_tokens if reads else 0.0,
            rotary=model.position.kind == "rotary",
            alibi=alibi,
            checkpointed=layout.checkpointing != "none",
            packed=layout.packed,
            tiles=layout.tiles,
        )

    alibi = model.position.kind == "alibi"
    if model.kind == "decoder_only":
        return [stack(model.decoder, batch.target, batch.target_tokens, alibi)]
    in_encoder = model.position.kind == "alibi" and model.position.encoder != "none"
    return [
        stack(model.encoder, batch.source, batch.source_tokens, in_encoder),
        stack(model.decoder, batch.target, batch.target_tokens, alibi, reads=True),
    ]


def _outside(workload: Workload, batch: MicroBatch, stacks: list[_Stack], *, padded: bool) -> float:
    """Embeddings, biases, final norms, the encoder's output, and what the projection of scored tokens keeps."""
    model, encoders, decoder = workload.model, stacks[:-1], stacks[-1]
    total = decoder.embedding("target") + decoder.bias(causal=True, padded=padded)
    for encoder in encoders:
        total += encoder.embedding("source") + encoder.bias(causal=False, padded=padded) + encoder.width
    total += sum(stack.norm() for stack in stacks if stack.has_final_norm())
    scored = batch.scored(workload)
    features, activation = scored * model.model_dim * workload.element_bytes, model.decoder.output_activation
    if activation not in (None, "linear"):
        total += features
    if has_output_map(model) and activation not in _KEEP_RESULT:
        total += features
    return total + 8 * scored
