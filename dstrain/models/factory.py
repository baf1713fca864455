"""The only module that builds modules from a configuration: the model, drawn from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, Literal, TypeVar, assert_never

import torch
from torch import nn

from dstrain.errors import RecipeError
from dstrain.models.config import (
    Activation,
    DecoderOnlyConfig,
    DecoderStackConfig,
    EncoderDecoderConfig,
    ModelConfig,
    StackConfig,
    VocabularySizes,
)
from dstrain.models.decoder_only import DecoderOnly
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.initialize import InitialValues
from dstrain.models.position_config import AlibiPosition, DecoderOnlyAlibiPosition, RotaryPosition
from dstrain.models.rotary import build_rotary
from dstrain.models.weights import canonical_shapes, load_canonical, parameter_layouts
from dstrain.nn.attention import CrossAttention, SelfAttention
from dstrain.nn.attention_bias import AttentionBias
from dstrain.nn.dropout import Dropout
from dstrain.nn.embedding import (
    FactorizedTokenEmbedding,
    InputEmbedding,
    Projection,
    TokenEmbedding,
    TokenPart,
    vocabulary_slice,
)
from dstrain.nn.feed_forward import FeedForward, GatedFeedForward
from dstrain.nn.layers import DecoderLayer, EncoderLayer
from dstrain.nn.linear import BlockLinear, FusedLinear, Linear, SeparateLinear
from dstrain.nn.norm import LayerNorm, RMSNorm
from dstrain.nn.position import LearnedPositions, NoPositions, PositionPart, SinusoidalPositions
from dstrain.nn.stack import LayerStack
from dstrain.ops.activation import ACTIVATIONS
from dstrain.ops.bias import Alibi, alibi_slopes
from dstrain.parallel.group import Group
from dstrain.parallel.tensor import even_shard, vocabulary_shard

Projections = Literal["fused", "separate"]
Model = EncoderDecoder | DecoderOnly
_L = TypeVar("_L", bound=nn.Module)


def build_model(
    config: ModelConfig,
    vocabulary: VocabularySizes,
    *,
    projections: Projections = "fused",
    seed: int | None,
    tensor: Group | None = None,
    sequence: Group | None = None,
) -> Model:
    """The model of `config`, in float32 whatever torch's default dtype and device are.

    projections: `fused` computes maps of the same input (q, k, v; k, v of the source; both halves of a gated network) in one
    matrix product, `separate` keeps one module each, which adapters can address; same results, same weights on disk. seed:
    decides the initial weights, whatever the projections; with None all parameters stay on the meta device, without memory, for
    `load_canonical` or an engine to fill from a `WeightSource`. tensor: the ranks that share one copy of the parameters, of which
    this one gets its part; sequence: those that share the tokens of a batch. `tensor_problems` and `sequence_problems` say which
    sizes are possible. RecipeError if the vocabularies do not suit the model or the ranks.
    """
    groups = [group if group is not None and group.size > 1 else None for group in (tensor, sequence)]
    if groups[0] is not None:
        _require_entries(vocabulary, groups[0])
    with torch.device("meta"):
        if config.kind == "encoder_decoder":
            model: Model = _EncoderDecoderFactory(config, vocabulary, projections, *groups).model()
        else:
            model = _DecoderOnlyFactory(config, vocabulary, projections, *groups).model()
    if seed is not None:
        load_canonical(model, initial_values(model, vocabulary, seed))
    return model


def _require_entries(vocabulary: VocabularySizes, tensor: Group) -> None:
    """Raises RecipeError if a rank would have no entry of a vocabulary."""
    for side, size in (("source", vocabulary.source), ("target", vocabulary.target)):
        last = vocabulary_shard(size, replace(tensor, rank=tensor.size - 1))
        if last.start == last.stop:
            raise RecipeError(
                f"engine.parallel.tensor = {tensor.size} leaves a rank without entries of the {side} vocabulary of {size}; "
                "lower it: a vocabulary may be uneven, but each rank takes equally many entries until none are left"
            )


def initial_values(model: nn.Module, vocabulary: VocabularySizes, seed: int) -> InitialValues:
    """The initial weights of a model that `build_model` made."""
    return InitialValues(canonical_shapes(parameter_layouts(model)), seed, vocabulary.pad_id)


C = TypeVar("C", bound=EncoderDecoderConfig | DecoderOnlyConfig)


@dataclass(frozen=True)
class _Factory(Generic[C]):
    """Parts of both kinds of model."""

    config: C
    vocabulary: VocabularySizes
    projections: Projections
    tensor: Group | None
    sequence: Group | None

    def input_embedding(self, tokens: TokenPart, max_length: int) -> InputEmbedding:
        return InputEmbedding(
            tokens=tokens,
            positions=self.positions(max_length),
            norm=self.norm() if self.config.embedding.norm else nn.Identity(),
            dropout=Dropout(self.config.dropout),
            model_dim=self.config.model_dim,
            scaled=self.config.embedding.scale,
        )

    def tokens(self, vocab_size: int, side: Literal["source", "target"]) -> TokenPart:
        embedding, dim = self.config.embedding, self.config.model_dim
        if embedding.kind == "plain" or embedding.sides not in ("both", side):
            return TokenEmbedding(vocab_size, dim, entries=self.tensor)
        return FactorizedTokenEmbedding(
            table=TokenEmbedding(vocab_size, embedding.dim, entries=self.tensor),
            activation=ACTIVATIONS[embedding.activation],
            up_proj=Linear(embedding.dim, dim, bias=False),
        )

    def projection(self, tokens: TokenPart | None, output_activation: Activation | None) -> Projection:
        """tokens: the embedding that the projection is tied to, None for a matrix of its own."""
        activation, dim = ACTIVATIONS[output_activation or "linear"], self.config.model_dim
        width = self.config.embedding.output_dim
        output_proj = None if width is None else Linear(dim, width, bias=False)
        entries, back = vocabulary_slice(self.vocabulary.target, self.tensor), None
        match tokens:
            case None:
                weight = nn.Parameter(torch.empty(len(entries) if entries else self.vocabulary.target, width or dim))
            case FactorizedTokenEmbedding():
                weight, back = tokens.table.weight, tokens.up_proj.weight if output_proj is None else None
            case TokenEmbedding():
                weight = tokens.weight
        return Projection(weight, activation=activation, output_proj=output_proj, back=back, vocabulary=entries)

    def positions(self, max_length: int) -> PositionPart:
        match self.config.position.kind:
            case "sinusoidal":
                return SinusoidalPositions(self.config.model_dim)
            case "learned":
                return LearnedPositions(max_length, self.config.model_dim)
            case "none" | "rotary" | "alibi":
                return NoPositions()
            case other:
                assert_never(other)

    def view(self, stack: StackConfig, *, causal: bool) -> AttentionBias:
        """The position encoding inside the self-attention of a stack."""
        build = partial(AttentionBias, causal=causal, sequence=self.sequence)
        match self.config.position:
            case RotaryPosition() as position:
                return build(rotary=build_rotary(position, self.head_dim(stack)))
            case AlibiPosition(encoder="none") if not causal:
                return build()
            case AlibiPosition(encoder="asymmetric") if not causal:
                return build(alibi=Alibi(self.head_slopes(stack), lead=0.5))
            case AlibiPosition() | DecoderOnlyAlibiPosition():
                return build(alibi=Alibi(self.head_slopes(stack)))
            case _:
                return build()

    def head_slopes(self, stack: StackConfig) -> tuple[float, ...]:
        """ALiBi's, of this rank's heads."""
        of_all_heads = tuple(alibi_slopes(stack.num_heads))
        if self.tensor is None:
            return of_all_heads
        shard = even_shard(0, stack.num_heads // self.tensor.size, self.tensor)
        return of_all_heads[shard.start : shard.stop]

    def stack(self, config: StackConfig, layer: Callable[[], _L]) -> LayerStack[_L]:
        return LayerStack(
            layers=[layer() for _ in range(config.unique_layers or config.depth)],
            schedule=config.schedule,
            layer_drop=config.layer_drop,
            final_norm=self.final_norm(config),
        )

    def self_layer(self, stack: StackConfig) -> EncoderLayer:
        return EncoderLayer(
            self_attention=self.self_attention(stack),
            self_attention_norm=self.norm(),
            feed_forward=self.feed_forward(stack),
            feed_forward_norm=self.norm(),
            norm_order=self.config.norm_order,
            dropout=Dropout(self.config.dropout),
        )

    def head_dim(self, stack: StackConfig) -> int:
        return self.config.model_dim // stack.num_heads

    def self_attention(self, stack: StackConfig) -> SelfAttention:
        dim, narrow = self.config.model_dim, (stack.num_kv_heads or stack.num_heads) * self.head_dim(stack)
        return SelfAttention(
            qkv=self.block_linear({"q_proj": dim, "k_proj": narrow, "v_proj": narrow}),
            out_proj=Linear(dim, dim, inputs=self.tensor),
            head_dim=self.head_dim(stack),
            dropout=self.config.attention_dropout,
            heads=self.tensor,
        )

    def block_linear(self, blocks: Mapping[str, int], *, bias: bool = True) -> BlockLinear:
        kind = FusedLinear if self.projections == "fused" else SeparateLinear
        return kind(self.config.model_dim, blocks, bias=bias, outputs=self.tensor)

    def feed_forward(self, stack: StackConfig) -> FeedForward | GatedFeedForward:
        dim, activation = self.config.model_dim, ACTIVATIONS[self.config.activation]
        dropout = Dropout(self.config.activation_dropout, features=self.tensor)
        if stack.feed_forward == "gated":
            return GatedFeedForward(
                up_gate=self.block_linear({"up_proj": stack.ffn_dim, "gate_proj": stack.ffn_dim}, bias=False),
                down_proj=Linear(stack.ffn_dim, dim, bias=False, inputs=self.tensor),
                activation=activation,
                dropout=dropout,
            )
        return FeedForward(
            up_proj=Linear(dim, stack.ffn_dim, outputs=self.tensor),
            down_proj=Linear(stack.ffn_dim, dim, inputs=self.tensor),
            activation=activation,
            dropout=dropout,
        )

    def final_norm(self, stack: StackConfig) -> nn.Module:
        is_normed = self.config.norm_order == "pre" if stack.final_norm == "auto" else stack.final_norm == "yes"
        return self.norm() if is_normed else nn.Identity()

    def norm(self) -> nn.Module:
        match self.config.norm.kind:
            case "layer_norm":
                return LayerNorm(self.config.model_dim, eps=self.config.norm.eps)
            case "rms_norm":
                return RMSNorm(self.config.model_dim, eps=self.config.norm.eps)
            case other:
                assert_never(other)


class _EncoderDecoderFactory(_Factory[EncoderDecoderConfig]):
    def model(self) -> EncoderDecoder:
        config, sizes, tie = self.config, self.vocabulary, self.config.embedding.tie
        if tie == "all" and sizes.source != sizes.target:
            raise RecipeError(
                f"model.embedding.tie = all needs one vocabulary for both sides, but they have {sizes.source} and {sizes.target} "
                "entries; train a joint tokenizer (data.tokenizer.sharing: joint) or choose tie: decoder"
            )
        source_tokens = self.tokens(sizes.source, "source")
        target_tokens = source_tokens if tie == "all" else self.tokens(sizes.target, "target")
        return EncoderDecoder(
            config=config,
            vocabulary=sizes,
            source_embedding=self.input_embedding(source_tokens, config.max_source_length),
            source_attention_bias=self.view(config.encoder, causal=False),
            encoder=self.stack(config.encoder, lambda: self.self_layer(config.encoder)),
            target_embedding=self.input_embedding(target_tokens, config.max_target_length),
            target_attention_bias=self.view(config.decoder, causal=True),
            decoder=self.stack(config.decoder, lambda: self.decoder_layer(config.decoder)),
            projection=self.projection(None if tie == "none" else target_tokens, config.decoder.output_activation),
        )

    def decoder_layer(self, stack: DecoderStackConfig) -> DecoderLayer:
        return DecoderLayer(
            self_attention=self.self_attention(stack),
            self_attention_norm=self.norm(),
            cross_attention=self.cross_attention(stack),
            cross_attention_norm=self.norm(),
            feed_forward=self.feed_forward(stack),
            feed_forward_norm=self.norm(),
            norm_order=self.config.norm_order,
            dropout=Dropout(self.config.dropout),
        )

    def cross_attention(self, stack: DecoderStackConfig) -> CrossAttention:
        dim, narrow = self.config.model_dim, (stack.num_cross_kv_heads or stack.num_heads) * self.head_dim(stack)
        return CrossAttention(
            q_proj=Linear(dim, dim, outputs=self.tensor),
            kv=self.block_linear({"k_proj": narrow, "v_proj": narrow}),
            out_proj=Linear(dim, dim, inputs=self.tensor),
            head_dim=self.head_dim(stack),
            dropout=self.config.attention_dropout,
            heads=self.tensor,
        )


class _DecoderOnlyFactory(_Factory[DecoderOnlyConfig]):
    def model(self) -> DecoderOnly:
        config, sizes = self.config, self.vocabulary
        if sizes.source != sizes.target:
            raise RecipeError(
                f"a decoder-only model reads source and target with one vocabulary, but they have {sizes.source} and "
                f"{sizes.target} entries; train a joint tokenizer (data.tokenizer.sharing: joint)"
            )
        tokens = self.tokens(sizes.target, "target")
        return DecoderOnly(
            config=config,
            vocabulary=sizes,
            target_embedding=self.input_embedding(tokens, config.max_target_length),
            target_attention_bias=self.view(config.decoder, causal=True),
            decoder=self.stack(config.decoder, lambda: self.self_layer(config.decoder)),
            projection=self.projection(None if config.embedding.tie == "none" else tokens, config.decoder.output_activation),
        )
