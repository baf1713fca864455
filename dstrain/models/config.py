"""The architecture of a model: parts chosen by `kind`, no flags that touch one another."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from dstrain.strict import Config

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "linear"]
Probability = Annotated[float, Field(ge=0, lt=1)]


class SinusoidalPosition(Config):
    """Fixed sines and cosines added to the embedding."""

    kind: Literal["sinusoidal"] = "sinusoidal"


class LearnedPosition(Config):
    """A trained vector per position added to the embedding; the length limits of the model are its size."""

    kind: Literal["learned"] = "learned"


class NoPosition(Config):
    """Nothing is added."""

    kind: Literal["none"] = "none"


PositionConfig = Annotated[SinusoidalPosition | LearnedPosition | NoPosition, Field(discriminator="kind")]


class LayerNormConfig(Config):
    """Layer normalization with weight and bias."""

    kind: Literal["layer_norm"] = "layer_norm"
    eps: float = Field(default=1e-5, gt=0)


NormConfig = Annotated[LayerNormConfig, Field()]


class PlainEmbedding(Config):
    """One vector of `model_dim` per token.

    scale: multiply by sqrt(model_dim). norm: normalize the sum of token and position. tie: `all` = source, target and output
    share one matrix; `decoder` = target and output; `none` = three matrices.
    """

    kind: Literal["plain"] = "plain"
    scale: bool = True
    norm: bool = False
    tie: Literal["all", "decoder", "none"] = "none"


EmbeddingConfig = Annotated[PlainEmbedding, Field()]


class StackConfig(Config):
    """An encoder or a decoder stack.

    depth: layer passes. final_norm: `auto` = a norm after the last layer exactly when norms come first (pre). layer_drop:
    probability of skipping a layer in training.
    """

    depth: PositiveInt
    num_heads: PositiveInt
    ffn_dim: PositiveInt
    layer_drop: Probability = 0.0
    final_norm: Literal["auto", "yes", "no"] = "auto"


class TransformerParts(Config):
    """What encoder-decoder and decoder-only models share. Vocabulary sizes come from the tokenizer, never from here."""

    model_dim: PositiveInt
    norm_order: Literal["pre", "post"] = "post"
    norm: NormConfig = Field(default_factory=LayerNormConfig)
    activation: Activation = "relu"
    position: PositionConfig = Field(default_factory=SinusoidalPosition)
    embedding: EmbeddingConfig = Field(default_factory=PlainEmbedding)
    dropout: Probability = 0.1
    attention_dropout: Probability = 0.0
    activation_dropout: Probability = 0.0
    max_target_length: PositiveInt = 1024


class EncoderDecoderConfig(TransformerParts):
    """A transformer with an encoder, a decoder and cross-attention."""

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    encoder: StackConfig
    decoder: StackConfig
    max_source_length: PositiveInt = 1024

    @model_validator(mode="after")
    def _heads_divide(self) -> EncoderDecoderConfig:
        for side in ("encoder", "decoder"):
            stack: StackConfig = getattr(self, side)
            if self.model_dim % stack.num_heads:
                raise ValueError(
                    f"{side}.num_heads = {stack.num_heads} does not divide model_dim = {self.model_dim}; choose a divisor"
                )
        return self


ModelConfig = Annotated[EncoderDecoderConfig, Field()]


class VocabularySizes(Config):
    """Rows of the embedding matrices and the ids that the model must know, taken from the tokenizers."""

    source: PositiveInt
    target: PositiveInt
    pad_id: int = 1
    eos_id: int = 2
