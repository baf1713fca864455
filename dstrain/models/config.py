"""The architecture of a model: modules chosen by `kind`, no flags that touch one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field, PositiveInt, model_validator

from dstrain.config_base import Config
from dstrain.models.position_config import DecoderOnlyPositionConfig, PositionConfig, RotaryPosition, SinusoidalPosition

if TYPE_CHECKING:
    from dstrain.protocols import TextTokenizer

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "linear"]
Probability = Annotated[float, Field(ge=0, lt=1)]


class LayerNormConfig(Config):
    """Layer normalization with weight and bias."""

    kind: Literal["layer_norm"] = "layer_norm"
    eps: float = Field(default=1e-5, gt=0, description="Added to the variance.")


class RmsNormConfig(Config):
    """Division by the root mean square, with a weight and no bias (Zhang and Sennrich 2019)."""

    kind: Literal["rms_norm"] = "rms_norm"
    eps: float = Field(default=1e-5, gt=0, description="Added to the mean square.")


NormConfig = Annotated[LayerNormConfig | RmsNormConfig, Field(discriminator="kind")]


class _Embedding(Config):
    """Settings of every embedding."""

    scale: bool = Field(default=True, description="Multiply token vectors by sqrt(model_dim).")
    norm: bool = Field(default=False, description="Normalize the sum of token and position.")
    tie: Literal["all", "decoder", "none"] = Field(
        default="none",
        description="Shared matrices: all = source, target and output; decoder = target and output; none = three matrices.",
    )
    output_dim: PositiveInt | None = Field(
        default=None,
        description="Width of a linear map without bias before the vocabulary matrix, which has this width too; null = no map.",
    )


class PlainEmbedding(_Embedding):
    """One vector of `model_dim` per token."""

    kind: Literal["plain"] = "plain"


class FactorizedEmbedding(_Embedding):
    """A vector of `dim` per token, an activation, and a linear map without bias to `model_dim`.

    A tied output without `output_dim` goes back through both factors transposed, without the activation.
    """

    kind: Literal["factorized"] = "factorized"
    dim: PositiveInt = Field(description="Width of the token vectors.")
    activation: Activation = Field(default="linear", description="Between the token vectors and the map to model_dim.")
    sides: Literal["both", "source", "target"] = Field(
        default="both", description="Sides of this width; the other one has vectors of model_dim. Of an encoder-decoder only."
    )

    @model_validator(mode="after")
    def _tied_sides_are_alike(self) -> FactorizedEmbedding:
        if self.tie == "all" and self.sides != "both":
            raise ValueError(f"sides = {self.sides} gives the sides unequal widths, but tie = all shares one; choose tie: none")
        return self


EmbeddingConfig = Annotated[PlainEmbedding | FactorizedEmbedding, Field(discriminator="kind")]


class StackConfig(Config):
    """A stack of layers."""

    depth: PositiveInt = Field(description="Layer passes.")
    unique_layers: PositiveInt | None = Field(
        default=None,
        description="Number of layers that the passes cycle through (recurrent stacking); null = every pass has its own layer.",
    )
    num_heads: PositiveInt = Field(description="Attention heads; a divisor of model_dim.")
    num_kv_heads: PositiveInt | None = Field(
        default=None, description="Heads of keys and values in self-attention (GQA; 1 = MQA); null = num_heads."
    )
    ffn_dim: PositiveInt = Field(description="Inner width of the feed-forward network.")
    feed_forward: Literal["plain", "gated"] = Field(
        default="plain", description="plain = down(act(up x)); gated = down(act(gate x) * up x), without biases (GLU)."
    )
    layer_drop: Probability = Field(default=0.0, description="Probability of skipping a layer pass in training.")
    final_norm: Literal["auto", "yes", "no"] = Field(
        default="auto", description="A norm after the last layer; auto = if norm_order is pre."
    )

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
        """Heads of keys and values by the keys that are set; others are `num_heads`."""
        return {} if self.num_kv_heads is None else {"num_kv_heads": self.num_kv_heads}


class DecoderOnlyStackConfig(StackConfig):
    """A decoder without cross-attention."""

    output_activation: Activation | None = Field(
        default=None, description="Applied to the features that the vocabulary matrix reads; null = none."
    )


class DecoderStackConfig(DecoderOnlyStackConfig):
    """A decoder with cross-attention."""

    num_cross_kv_heads: PositiveInt | None = Field(
        default=None, description="Heads of keys and values in cross-attention; null = num_heads."
    )

    def kv_heads(self) -> dict[str, int]:
        """Heads of keys and values by the keys that are set; others are `num_heads`."""
        cross = {} if self.num_cross_kv_heads is None else {"num_cross_kv_heads": self.num_cross_kv_heads}
        return super().kv_heads() | cross


class TransformerParts(Config):
    """Fields of encoder-decoder and decoder-only models. Vocabulary sizes come from the tokenizer, never from here."""

    model_dim: PositiveInt = Field(description="Width of the hidden states.")
    norm_order: Literal["pre", "post"] = Field(default="post", description="Norms before each sub-layer, or after it.")
    norm: NormConfig = Field(default_factory=LayerNormConfig, description="Normalization of all layers.")
    activation: Activation = Field(default="relu", description="Of the feed-forward networks.")
    embedding: EmbeddingConfig = Field(default_factory=PlainEmbedding, description="Token vectors and the vocabulary matrix.")
    dropout: Probability = Field(default=0.1, description="On embeddings and on the output of each sub-layer.")
    attention_dropout: Probability = Field(default=0.0, description="On attention probabilities.")
    activation_dropout: Probability = Field(default=0.0, description="Inside the feed-forward networks.")
    max_target_length: PositiveInt = Field(default=1024, description="Longest target in tokens, EOS included.")

    @model_validator(mode="after")
    def _tied_widths_fit(self) -> TransformerParts:
        """A tied vocabulary matrix is as wide as the token vectors, so the output projection must end there."""
        embedding = self.embedding
        width = embedding.dim if embedding.kind == "factorized" and embedding.sides != "source" else self.model_dim
        if embedding.tie != "none" and embedding.output_dim not in (None, width):
            raise ValueError(
                f"embedding.output_dim = {embedding.output_dim} differs from the width of the tied token vectors, {width}; "
                "choose the same width, or tie: none"
            )
        return self


class LengthLimits(NamedTuple):
    """The longest sequences that a model reads, EOS or start token included. joint: `target` is for both sides together."""

    source: int
    target: int
    joint: bool

    def target_after(self, source_length: int) -> int:
        """The longest target of a source of that length, its EOS counted."""
        return self.target - (source_length - 1 if self.joint else 0)


class EncoderDecoderConfig(TransformerParts):
    """A transformer with an encoder, a decoder and cross-attention."""

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    position: PositionConfig = Field(default_factory=SinusoidalPosition, description="How token order enters the model.")
    encoder: StackConfig = Field(description="The stack that reads the source.")
    decoder: DecoderStackConfig = Field(description="The stack that predicts the target.")
    max_source_length: PositiveInt = Field(default=1024, description="Longest source in tokens, EOS included.")

    @property
    def limits(self) -> LengthLimits:
        """How long sequences may be."""
        return LengthLimits(self.max_source_length, self.max_target_length, joint=False)

    @model_validator(mode="after")
    def _heads_fit(self) -> EncoderDecoderConfig:
        _check_heads(self.model_dim, self.position, {"encoder": self.encoder, "decoder": self.decoder})
        return self


class DecoderOnlyConfig(TransformerParts):
    """A causal language model. A source, if there is one, is text that the target continues."""

    kind: Literal["decoder_only"] = "decoder_only"
    position: DecoderOnlyPositionConfig = Field(
        default_factory=SinusoidalPosition, description="How token order enters the model."
    )
    decoder: DecoderOnlyStackConfig = Field(description="The only stack.")
    max_target_length: PositiveInt = Field(default=2048, description="Longest sequence in tokens, source and target together.")

    @property
    def limits(self) -> LengthLimits:
        """How long sequences may be."""
        return LengthLimits(self.max_target_length, self.max_target_length, joint=True)

    @model_validator(mode="after")
    def _heads_and_ties_fit(self) -> DecoderOnlyConfig:
        _check_heads(self.model_dim, self.position, {"decoder": self.decoder})
        if self.embedding.tie == "all":
            raise ValueError("embedding.tie = all ties both sides, but a decoder-only model has one; choose tie: decoder")
        if self.embedding.kind == "factorized" and self.embedding.sides != "both":
            raise ValueError(f"embedding.sides = {self.embedding.sides}: a decoder-only model has one side; leave sides out")
        return self


def _check_heads(model_dim: int, position: Config, stacks: Mapping[str, StackConfig]) -> None:
    for side, stack in stacks.items():
        if model_dim % stack.num_heads:
            raise ValueError(f"{side}.num_heads = {stack.num_heads} does not divide model_dim = {model_dim}; choose a divisor")
        if isinstance(position, RotaryPosition):
            position.rotated_features(model_dim // stack.num_heads)


ModelConfig = Annotated[EncoderDecoderConfig | DecoderOnlyConfig, Field(discriminator="kind")]


def tensor_problems(config: EncoderDecoderConfig | DecoderOnlyConfig, tensor: int) -> Iterator[str]:
    """Why `tensor` ranks cannot share the model, in words; nothing if they can. Vocabularies may be uneven."""
    stacks: dict[str, StackConfig] = {"decoder": config.decoder}
    if config.kind == "encoder_decoder":
        stacks["encoder"] = config.encoder
    for side, stack in stacks.items():
        sizes = {"num_heads": stack.num_heads, **stack.kv_heads(), "ffn_dim": stack.ffn_dim}
        for name, size in sizes.items():
            if size % tensor:
                yield (
                    f"engine.parallel.tensor = {tensor} does not divide model.{side}.{name} = {size}: each rank takes as many "
                    "heads and features; choose a divisor"
                )


def sequence_problems(
    config: EncoderDecoderConfig | DecoderOnlyConfig, *, tensor: int, sequence: int, owner: str = "model."
) -> Iterator[str]:
    """Why `sequence` ranks cannot share the heads that each of `tensor` ranks has, in words. owner: in front of the keys."""
    stacks: dict[str, StackConfig] = {"decoder": config.decoder}
    if config.kind == "encoder_decoder":
        stacks["encoder"] = config.encoder
    for side, stack in stacks.items():
        for name, size in {"num_heads": stack.num_heads, **stack.kv_heads()}.items():
            heads, may_repeat = size // tensor, name != "num_heads"
            if size % tensor or heads % sequence == 0 or (may_repeat and sequence % heads == 0):
                continue
            yield (
                f"engine.parallel.sequence = {sequence} does not suit {owner}{side}.{name} = {size}"
                + (f" over {tensor} tensor ranks" if tensor > 1 else "")
                + f": the ranks share heads; choose {'a divisor or a multiple' if may_repeat else 'a divisor'} of the heads"
            )


class VocabularySizes(Config):
    """Rows of the embedding matrices and the ids that the model must know, taken from the tokenizers."""

    source: PositiveInt = Field(description="Entries of the source vocabulary.")
    target: PositiveInt = Field(description="Entries of the target vocabulary.")
    pad_id: int = Field(default=1, description="Id of padding.")
    eos_id: int = Field(default=2, description="Id of the end of a sequence.")
    start_id: int | None = Field(default=None, description="Id that a decoder reads in front of a target; null = eos_id.")

    @classmethod
    def of(cls, source: TextTokenizer, target: TextTokenizer) -> VocabularySizes:
        """Those of the tokenizers of a model."""
        start = None if target.start_id == target.eos_id else target.start_id
        sizes = {"source": source.vocab_size, "target": target.vocab_size}
        return cls(**sizes, pad_id=target.pad_id, eos_id=target.eos_id, start_id=start)

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """pad, eos and start."""
        return self.pad_id, self.eos_id, self.eos_id if self.start_id is None else self.start_id
