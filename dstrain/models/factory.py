"""The one place where a configuration becomes modules: the model, drawn from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import nn

from dstrain.errors import RecipeError
from dstrain.models.config import EncoderDecoderConfig, ModelConfig, StackConfig, VocabularySizes
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.initialize import initialize
from dstrain.nn.attention import CrossAttention, SelfAttention
from dstrain.nn.dropout import Dropout
from dstrain.nn.embedding import InputEmbedding, Projection, TokenEmbedding
from dstrain.nn.feed_forward import FeedForward
from dstrain.nn.layers import DecoderLayer, EncoderLayer
from dstrain.nn.linear import BlockLinear, FusedLinear, Linear, SeparateLinear
from dstrain.nn.position import LearnedPositions, NoPositions, PositionPart, SinusoidalPositions
from dstrain.nn.stack import LayerStack
from dstrain.ops.activation import ACTIVATIONS

Projections = Literal["fused", "separate"]


def build_model(
    config: ModelConfig, vocabulary: VocabularySizes, *, projections: Projections = "fused", seed: int | None
) -> EncoderDecoder:
    """The model of `config`, in float32.

    projections: `fused` computes q, k, v (and k, v of the source) in one matrix product, `separate` keeps one module each, which
    adapters can address; same results, same weights on disk. seed: decides the initial weights, whatever the projections;
    None leaves them unset, for weights about to be loaded. RecipeError if the embeddings cannot be tied.
    """
    model = _Factory(config, vocabulary, projections).model()
    if seed is not None:
        initialize(model, seed, vocabulary.pad_id)
    return model


@dataclass(frozen=True)
class _Factory:
    config: EncoderDecoderConfig
    vocabulary: VocabularySizes
    projections: Projections

    def model(self) -> EncoderDecoder:
        config, sizes, tie = self.config, self.vocabulary, self.config.embedding.tie
        if tie == "all" and sizes.source != sizes.target:
            raise RecipeError(
                f"model.embedding.tie = all needs one vocabulary for both sides, but they have {sizes.source} and {sizes.target} "
                "entries; train a joint tokenizer (data.tokenizer.sharing: joint) or choose tie: decoder"
            )
        source_tokens = TokenEmbedding(sizes.source, config.model_dim)
        target_tokens = source_tokens if tie == "all" else TokenEmbedding(sizes.target, config.model_dim)
        output = nn.Parameter(torch.empty(sizes.target, config.model_dim)) if tie == "none" else target_tokens.weight
        return EncoderDecoder(
            config=config,
            vocabulary=sizes,
            source_embedding=self.input_embedding(source_tokens, config.max_source_length),
            encoder=self.encoder(config.encoder),
            target_embedding=self.input_embedding(target_tokens, config.max_target_length),
            decoder=self.decoder(config.decoder),
            projection=Projection(output),
        )

    def input_embedding(self, tokens: TokenEmbedding, max_length: int) -> InputEmbedding:
        return InputEmbedding(
            tokens=tokens,
            positions=self.positions(max_length),
            norm=self.norm() if self.config.embedding.norm else nn.Identity(),
            dropout=Dropout(self.config.dropout),
            model_dim=self.config.model_dim,
            scaled=self.config.embedding.scale,
        )

    def positions(self, max_length: int) -> PositionPart:
        match self.config.position.kind:
            case "sinusoidal":
                return SinusoidalPositions(self.config.model_dim)
            case "learned":
                return LearnedPositions(max_length, self.config.model_dim)
            case "none":
                return NoPositions()
            case other:
                assert_never(other)

    def encoder(self, stack: StackConfig) -> LayerStack[EncoderLayer]:
        return LayerStack(
            layers=[self.encoder_layer(stack) for _ in range(stack.depth)],
            schedule=range(stack.depth),
            layer_drop=stack.layer_drop,
            final_norm=self.final_norm(stack),
        )

    def decoder(self, stack: StackConfig) -> LayerStack[DecoderLayer]:
        return LayerStack(
            layers=[self.decoder_layer(stack) for _ in range(stack.depth)],
            schedule=range(stack.depth),
            layer_drop=stack.layer_drop,
            final_norm=self.final_norm(stack),
        )

    def encoder_layer(self, stack: StackConfig) -> EncoderLayer:
        return EncoderLayer(
            self_attention=self.self_attention(stack),
            self_attention_norm=self.norm(),
            feed_forward=self.feed_forward(stack),
            feed_forward_norm=self.norm(),
            norm_order=self.config.norm_order,
            dropout=Dropout(self.config.dropout),
        )

    def decoder_layer(self, stack: StackConfig) -> DecoderLayer:
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

    def self_attention(self, stack: StackConfig) -> SelfAttention:
        dim = self.config.model_dim
        return SelfAttention(
            qkv=self.block_linear({"q_proj": dim, "k_proj": dim, "v_proj": dim}),
            out_proj=Linear(dim, dim),
            head_dim=dim // stack.num_heads,
            dropout=self.config.attention_dropout,
        )

    def cross_attention(self, stack: StackConfig) -> CrossAttention:
        dim = self.config.model_dim
        return CrossAttention(
            q_proj=Linear(dim, dim),
            kv=self.block_linear({"k_proj": dim, "v_proj": dim}),
            out_proj=Linear(dim, dim),
            head_dim=dim // stack.num_heads,
            dropout=self.config.attention_dropout,
        )

    def block_linear(self, blocks: Mapping[str, int]) -> BlockLinear:
        kind = FusedLinear if self.projections == "fused" else SeparateLinear
        return kind(self.config.model_dim, blocks)

    def feed_forward(self, stack: StackConfig) -> nn.Module:
        return FeedForward(
            up_proj=Linear(self.config.model_dim, stack.ffn_dim),
            down_proj=Linear(stack.ffn_dim, self.config.model_dim),
            activation=ACTIVATIONS[self.config.activation],
            dropout=Dropout(self.config.activation_dropout),
        )

    def final_norm(self, stack: StackConfig) -> nn.Module:
        wanted = self.config.norm_order == "pre" if stack.final_norm == "auto" else stack.final_norm == "yes"
        return self.norm() if wanted else nn.Identity()

    def norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.model_dim, eps=self.config.norm.eps)
