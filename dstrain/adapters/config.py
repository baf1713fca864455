"""Adapters: trained beside a frozen base."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dstrain.config_base import Config


class LoraConfig(Config):
    """Low-rank adapters (LoRA, Hu et al. 2022): each target's matrix W becomes W + scale B A, and only A and B are trained.

    A matrix that modules share (tied embeddings, stacked layers) has one adapter, which acts wherever the matrix does, whichever
    module is named. Targets are linear maps, token tables (`tokens`, `table`) and the vocabulary `projection`.
    """

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = Field(description="Rows of A.")
    alpha: PositiveFloat = Field(description="scale = alpha / rank.")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="On the input of A; token tables and the vocabulary projection have none."
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Biases that are trained too: all of the model, or lora_only = those of the adapted maps."
    )
    targets: tuple[str, ...] = Field(
        min_length=1,
        description="Last names (q_proj), paths (decoder.layers.3.cross_attention.q_proj) or patterns (decoder.*.[kv]_proj).",
    )
    rank_scaled: bool = Field(default=False, description="scale = alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023).")
    dora: bool = Field(
        default=False, description="A trained norm for each row, with the direction of W + scale B A (DoRA, Liu et al. 2024)."
    )

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_scaled else self.rank)


AdapterConfig = Annotated[LoraConfig, Field()]
