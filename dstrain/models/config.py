"""The architecture of a model: parts chosen by `kind`, no flags that touch one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PositiveInt, model_validator

from dstrain.config_base import Config

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


class NoScaling(Config):
    """Rotary positions as they are."""

    kind: Literal["none"] = "none"


class LinearScaling(Config):
    """Positions divided by `factor` (position interpolation, Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1)


class DynamicNtkScaling(Config):
    """Sequences of L > M = original_length tokens turn by the base theta * (factor L / M - (factor - 1))^(d / (d - 2)).

    L is a sequence's own length, whatever the batch around it.
    """

    kind: Literal["dynamic_ntk"] = "dynamic_ntk"
    factor: float = Field(default=1.0, ge=1)
    original_length: PositiveInt


class YarnScaling(Config):
    """YaRN (Peng et al. 2023): slow frequencies are divided by `factor`, fast ones kept, a ramp between; see ops/rotary.py.

    original_length: what the model was trained with. beta_fast, beta_slow: turns within it from which on a frequency is kept, and
    up to which it is divided. extrapolation_factor: how much of the fast ones is kept. attention_factor: multiplies the paper's
    0.1 ln(factor) + 1 on queries and keys alike.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)
    original_length: PositiveInt
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    extrapolation_factor: float = Field(default=1.0, ge=0)
    attention_factor: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _slow_below_fast(self) -> YarnScaling:
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow = {self.beta_slow} must be below beta_fast = {self.beta_fast}")
        return self


class DynamicYarnScaling(YarnScaling):
    """YaRN whose factor follows the length L of each sequence: the larger of `factor` and L / from_length.

    from_length: the length beyond which the factor grows; `original_length` if left out.
    """

    kind: Literal["dynamic_yarn"] = "dynamic_yarn"  # type: ignore[assignment]
    factor: float = Field(default=1.0, ge=1)
    from_length: PositiveInt | None = None


ScalingConfig = Annotated[
    NoScaling | LinearScaling | DynamicNtkScaling | YarnScaling | DynamicYarnScaling, Field(discriminator="kind")
]


class RotaryPosition(Config):
    """Queries and keys of self-attention turn with their position (RoPE, Su et al. 2021).

    fraction: of each head's features that turn, the first ones. layout: which features form a pair: `half_split` i and i + d/2
    (Llama), `interleaved` 2i and 2i + 1.
    """

    kind: Literal["rotary"] = "rotary"
    theta: float = Field(default=10000.0, gt=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    layout: Literal["half_split", "interleaved"] = "half_split"
    scaling: ScalingConfig = Field(default_factory=NoScaling)

    def turning(self, head_dim: int) -> int:
        """How many of a head's features turn. ValueError unless that is an even number."""
        features = head_dim * self.fraction
        if features != int(features) or features % 2:
            raise ValueError(
                f"position.fraction = {self.fraction} turns {features:g} of a head's {head_dim} features, which form no pairs; "
                "choose num_heads and fraction so that this is an even number"
            )
        return int(features)


class AlibiPosition(Config):
    """Attention scores fall with distance, by a slope of each head (ALiBi, Press et al. 2022); nothing in cross-attention.

    encoder: `symmetric`, -slope |i - j|; `asymmetric`, half a step less to what comes later; `none`, no position in the encoder.
    """

    kind: Literal["alibi"] = "alibi"
    encoder: Literal["symmetric", "asymmetric", "none"] = "symmetric"


class DecoderOnlyAlibiPosition(Config):
    """ALiBi of a model without an encoder."""

    kind: Literal["alibi"] = "alibi"


_Added = SinusoidalPosition | LearnedPosition | NoPosition
PositionConfig = Annotated[_Added | RotaryPosition | AlibiPosition, Field(discriminator="kind")]
DecoderOnlyPositionConfig = Annotated[_Added | RotaryPosition | DecoderOnlyAlibiPosition, Field(discriminator="kind")]


class LayerNormConfig(Config):
    """Layer normalization with weight and bias."""

    kind: Literal["layer_norm"] = "layer_norm"
    eps: float = Field(default=1e-5, gt=0)


class RmsNormConfig(Config):
    """Division by the root mean square, with a weight and no bias (Zhang and Sennrich 2019)."""

    kind: Literal["rms_norm"] = "rms_norm"
    eps: float = Field(default=1e-5, gt=0)


NormConfig = Annotated[LayerNormConfig | RmsNormConfig, Field(discriminator="kind")]


class _Embedding(Config):
    """scale: multiply by sqrt(model_dim). norm: normalize the sum of token and position.

    tie: `all` = source, target and output share one matrix; `decoder` = target and output; `none` = three matrices.
    """

    scale: bool = True
    norm: bool = False
    tie: Literal["all", "decoder", "none"] = "none"


class PlainEmbedding(_Embedding):
    """One vector of `model_dim` per token."""

    kind: Literal["plain"] = "plain"


class FactorizedEmbedding(_Embedding):
    """A vector of `dim` per token, an activation, and a linear map to `model_dim`.

    A tied output goes back through both: the map transposed, then the vectors transposed, without the activation.
    """

    kind: Literal["factorized"] = "factorized"
    dim: PositiveInt
    activation: Activation = "linear"


EmbeddingConfig = Annotated[PlainEmbedding | FactorizedEmbedding, Field(discriminator="kind")]


class StackConfig(Config):
    """A stack of layers.

    depth: layer passes. unique_layers: how many layers there are, which the passes go through in turns (recurrent stacking);
    left out, every pass has a layer of its own. num_kv_heads: heads of keys and values in self-attention (GQA; 1 is MQA), as many
    as num_heads if left out. feed_forward: `plain` down(act(up x)); `gated` down(act(gate x) * up x), without biases (GLU).
    final_norm: `auto` = a norm after the last layer exactly when norms come first (pre). layer_drop: probability of skipping a
    layer pass in training.
    """

    depth: PositiveInt
    unique_layers: PositiveInt | None = None
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    ffn_dim: PositiveInt
    feed_forward: Literal["plain", "gated"] = "plain"
    layer_drop: Probability = 0.0
    final_norm: Literal["auto", "yes", "no"] = "auto"

    @property
    def schedule(self) -> list[int]:
        """The layer that each pass goes through."""
        return [depth % (self.unique_layers or self.depth) for depth in range(self.depth)]

    @model_validator(mode="after")
    def _layers_and_heads_fit(self) -> StackConfig:
        if self.unique_layers is not None and self.unique_layers > self.depth:
            raise ValueError(
                f"unique_layers = {self.unique_layers} exceeds depth = {self.depth}, so some layers would never run; lower it"
            )
        for name, heads in self.kv_heads().items():
            if self.num_heads % heads:
                raise ValueError(f"{name} = {heads} does not divide num_heads = {self.num_heads}; choose a divisor")
        return self

    def kv_heads(self) -> dict[str, int]:
        """Heads of keys and values by the key that sets them."""
        return {"num_kv_heads": self.num_kv_heads or self.num_heads}


class DecoderOnlyStackConfig(StackConfig):
    """output_activation: applied to what the vocabulary projection reads; left out, none."""

    output_activation: Activation | None = None


class DecoderStackConfig(DecoderOnlyStackConfig):
    """num_cross_kv_heads: heads of keys and values in cross-attention, as many as num_heads if left out."""

    num_cross_kv_heads: PositiveInt | None = None

    def kv_heads(self) -> dict[str, int]:
        """Heads of keys and values by the key that sets them."""
        return {**super().kv_heads(), "num_cross_kv_heads": self.num_cross_kv_heads or self.num_heads}


class TransformerParts(Config):
    """What encoder-decoder and decoder-only models share. Vocabulary sizes come from the tokenizer, never from here."""

    model_dim: PositiveInt
    norm_order: Literal["pre", "post"] = "post"
    norm: NormConfig = Field(default_factory=LayerNormConfig)
    activation: Activation = "relu"
    embedding: EmbeddingConfig = Field(default_factory=PlainEmbedding)
    dropout: Probability = 0.1
    attention_dropout: Probability = 0.0
    activation_dropout: Probability = 0.0
    max_target_length: PositiveInt = 1024


class LengthLimits(NamedTuple):
    """The most tokens that a model reads of a side, EOS or start token counted. joint: `target` is for both sides together."""

    source: int
    target: int
    joint: bool

    @property
    def sides(self) -> Literal["apart", "joined"]:
        """How source and target count towards a batch; see `data.plan.Sides`."""
        return "joined" if self.joint else "apart"

    def target_after(self, source_length: int) -> int:
        """The longest target of a source of that length, its EOS counted."""
        return self.target - (source_length - 1 if self.joint else 0)


class EncoderDecoderConfig(TransformerParts):
    """A transformer with an encoder, a decoder and cross-attention."""

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    position: PositionConfig = Field(default_factory=SinusoidalPosition)
    encoder: StackConfig
    decoder: DecoderStackConfig
    max_source_length: PositiveInt = 1024

    @property
    def limits(self) -> LengthLimits:
        """How long sequences may be."""
        return LengthLimits(self.max_source_length, self.max_target_length, joint=False)

    @model_validator(mode="after")
    def _heads_fit(self) -> EncoderDecoderConfig:
        _check_heads(self.model_dim, self.position, {"encoder": self.encoder, "decoder": self.decoder})
        return self


class DecoderOnlyConfig(TransformerParts):
    """A causal language model. A source, where there is one, is text that the target goes on from.

    max_target_length: tokens of source and target together.
    """

    kind: Literal["decoder_only"] = "decoder_only"
    position: DecoderOnlyPositionConfig = Field(default_factory=SinusoidalPosition)
    decoder: DecoderOnlyStackConfig
    max_target_length: PositiveInt = 2048

    @property
    def limits(self) -> LengthLimits:
        """How long sequences may be."""
        return LengthLimits(self.max_target_length, self.max_target_length, joint=True)

    @model_validator(mode="after")
    def _heads_and_ties_fit(self) -> DecoderOnlyConfig:
        _check_heads(self.model_dim, self.position, {"decoder": self.decoder})
        if self.embedding.tie == "all":
            raise ValueError("embedding.tie = all ties both sides, but a decoder-only model has one; choose tie: decoder")
        return self


def _check_heads(model_dim: int, position: Config, stacks: Mapping[str, StackConfig]) -> None:
    for side, stack in stacks.items():
        if model_dim % stack.num_heads:
            raise ValueError(f"{side}.num_heads = {stack.num_heads} does not divide model_dim = {model_dim}; choose a divisor")
        if isinstance(position, RotaryPosition):
            position.turning(model_dim // stack.num_heads)


ModelConfig = Annotated[EncoderDecoderConfig | DecoderOnlyConfig, Field(discriminator="kind")]


class VocabularySizes(Config):
    """Rows of the embedding matrices and the ids that the model must know, taken from the tokenizers."""

    source: PositiveInt
    target: PositiveInt
    pad_id: int = 1
    eos_id: int = 2
