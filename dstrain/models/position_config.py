"""How token order enters a model: added to the embedding, by rotation with its scalings, or as a bias of attention."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from dstrain.config_base import Config


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
    """Position interpolation (Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1, description="Positions are divided by it.")


class NtkScaling(Config):
    """The base theta becomes theta * factor^(d / (d - 2)), d rotated features of a head: the slowest pair turns `factor` times
    slower, the fastest as before ("NTK-aware" interpolation, bloc97 2023)."""

    kind: Literal["ntk"] = "ntk"
    factor: float = Field(ge=1, description="Context extension.")


class DynamicNtkScaling(Config):
    """Sequences of L > M = original_length tokens rotate by the base theta * (factor L / M - (factor - 1))^(d / (d - 2)).

    L is the length of the sequence itself, not of its batch. Losses are computed with the whole target's L; generation and forced
    scores use, for each token, the L that ends with it.
    """

    kind: Literal["dynamic_ntk"] = "dynamic_ntk"
    factor: float = Field(default=1.0, ge=1, description="How fast the base grows with L / original_length.")
    original_length: PositiveInt = Field(description="Length in tokens up to which nothing is scaled.")


class YarnScaling(Config):
    """YaRN (Peng et al. 2023): low frequencies are interpolated, high ones kept, with a ramp between; see ops/rotary.py."""

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1, description="Context extension: the low frequencies are divided by it.")
    original_length: PositiveInt = Field(description="Length in tokens that the model was trained with.")
    beta_fast: float = Field(
        default=32.0, gt=0, description="Frequencies with more rotations than this over original_length are kept."
    )
    beta_slow: float = Field(
        default=1.0, gt=0, description="Frequencies with fewer rotations than this over original_length are divided by factor."
    )
    extrapolation_factor: float = Field(default=1.0, ge=0, description="Share of the high frequencies that is kept.")
    attention_factor: float = Field(
        default=1.0, gt=0, description="Multiplies the paper's 0.1 ln(factor) + 1 on queries and on keys."
    )

    @model_validator(mode="after")
    def _slow_below_fast(self) -> YarnScaling:
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow = {self.beta_slow} must be below beta_fast = {self.beta_fast}")
        return self


class DynamicYarnScaling(YarnScaling):
    """YaRN whose factor follows the length L of each sequence: the larger of `factor` and L / from_length.

    L is as in dynamic_ntk.
    """

    kind: Literal["dynamic_yarn"] = "dynamic_yarn"  # type: ignore[assignment]
    factor: float = Field(default=1.0, ge=1, description="The least factor, also of short sequences.")
    from_length: PositiveInt | None = Field(
        default=None, description="Length in tokens beyond which the factor grows; null = original_length."
    )


ScalingConfig = Annotated[
    NoScaling | LinearScaling | NtkScaling | DynamicNtkScaling | YarnScaling | DynamicYarnScaling, Field(discriminator="kind")
]


class RotaryPosition(Config):
    """Queries and keys of self-attention are rotated by their position (RoPE, Su et al. 2021)."""

    kind: Literal["rotary"] = "rotary"
    theta: float = Field(default=10000.0, gt=1, description="Base of the frequencies.")
    fraction: float = Field(default=1.0, gt=0, le=1, description="Share of each head's features that is rotated, the first ones.")
    layout: Literal["half_split", "interleaved"] = Field(
        default="half_split", description="Features of a pair: half_split = i and i + d/2 (Llama), interleaved = 2i and 2i + 1."
    )
    scaling: ScalingConfig = Field(default_factory=NoScaling, description="How longer contexts than the trained one are reached.")

    def rotated_features(self, head_dim: int) -> int:
        """How many of a head's features are rotated. ValueError unless that is an even number."""
        features = head_dim * self.fraction
        if features != int(features) or features % 2:
            raise ValueError(
                f"position.fraction = {self.fraction} rotates {features:g} of a head's {head_dim} features, which form no pairs; "
                "choose num_heads and fraction so that this is an even number"
            )
        return int(features)


class AlibiPosition(Config):
    """Attention scores fall linearly with distance, by a slope per head (ALiBi, Press et al. 2022); not in cross-attention."""

    kind: Literal["alibi"] = "alibi"
    encoder: Literal["symmetric", "asymmetric", "none"] = Field(
        default="symmetric",
        description="symmetric = -slope |i - j|; asymmetric = half a step less for later tokens; none = no position there.",
    )


class DecoderOnlyAlibiPosition(Config):
    """ALiBi of a model without an encoder."""

    kind: Literal["alibi"] = "alibi"


_Added = SinusoidalPosition | LearnedPosition | NoPosition
PositionConfig = Annotated[_Added | RotaryPosition | AlibiPosition, Field(discriminator="kind")]
DecoderOnlyPositionConfig = Annotated[_Added | RotaryPosition | DecoderOnlyAlibiPosition, Field(discriminator="kind")]
