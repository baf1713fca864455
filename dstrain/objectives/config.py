"""What is minimized."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dstrain.config_base import Config


class RDropConfig(Config):
    """R-Drop: each training sentence runs twice with different dropout, and the two distributions of a token are kept together.

    The loss is half of (both cross-entropies + alpha times their symmetric divergence), see `ops/linear_r_drop.py`: alpha is the
    paper's, which has 5 for translation. Time and memory of a micro-batch double; validation runs once, without it.
    """

    alpha: PositiveFloat = 1.0


class CrossEntropyConfig(Config):
    """Label-smoothed cross-entropy over target tokens.

    average: what a step's loss is the mean over: `tokens`, or `sentences`, each of which is the mean over its own tokens, so that
    short ones count as much as long ones. chunk_tokens: positions whose logits exist at one time; memory is chunk_tokens x
    vocabulary. It moves no result.
    """

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    average: Literal["tokens", "sentences"] = "tokens"
    r_drop: RDropConfig | None = None
    chunk_tokens: PositiveInt = 1024
