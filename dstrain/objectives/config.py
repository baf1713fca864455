"""What is minimized."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from dstrain.strict import Config


class CrossEntropyConfig(Config):
    """Label-smoothed cross-entropy over target tokens.

    chunk_tokens: positions whose logits exist at one time; memory is chunk_tokens x vocabulary. It moves no result.
    """

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    chunk_tokens: PositiveInt = 1024


ObjectiveConfig = Annotated[CrossEntropyConfig, Field()]
