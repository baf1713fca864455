"""What is minimized."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dstrain.config_base import Config


class RDropConfig(Config):
    """R-Drop: each training sentence runs twice with different dropout, and the two distributions of a token are kept together.

    The loss is half of (both cross-entropies + alpha times their symmetric divergence). Time and memory of a micro-batch double;
    validation runs once, without it.
    """

    alpha: PositiveFloat = Field(default=1.0, description="Factor of the divergence; the paper has 5 for translation.")


class CrossEntropyConfig(Config):
    """Label-smoothed cross-entropy over target tokens."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(default=0.1, ge=0, lt=1, description="Probability mass spread over the vocabulary.")
    average: Literal["tokens", "sentences"] = Field(
        default="tokens",
        description="Mean over tokens, or over sentences of the mean of their tokens: short ones count as much as long ones.",
    )
    r_drop: RDropConfig | None = Field(default=None, description="R-Drop regularization; null = none.")
    chunk_tokens: PositiveInt = Field(
        default=1024,
        description="Positions whose logits exist at one time; memory is chunk_tokens x vocabulary. Moves no result.",
    )
