"""Adapters: what is trained beside a frozen base."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dstrain.config_base import Config


class LoraConfig(Config):
    """Low-rank adapters (LoRA, Hu et al. 2022): each target's matrix W becomes W + scale B A, and only A and B are trained.

    rank: rows of A. alpha: scale = alpha / rank, or alpha / sqrt(rank) with rank_scaled (rsLoRA, Kalajdzievski 2023). dropout: on
    what the adapter of a linear map reads; those of token tables and of the vocabulary projection have none. bias: which biases
    are trained too: `none`, `all` of the model, `lora_only` those of the adapted maps. dora: a trained length for each row of the
    matrix, and a direction from W + scale B A (DoRA, Liu et al. 2024).

    targets: last names (`q_proj`), whole paths (`decoder.layers.3.cross_attention.q_proj`) or patterns of whole paths
    (`decoder.*.[kv]_proj`) of linear maps, token tables (`tokens`, `table`) and the vocabulary `projection`. A matrix that parts
    share (tied embeddings, stacked layers) has one adapter, which acts wherever the matrix does, whichever part is named.
    """

    kind: Literal["lora"] = "lora"
    rank: PositiveInt
    alpha: PositiveFloat
    dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = "none"
    targets: tuple[str, ...] = Field(min_length=1)
    rank_scaled: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_scaled else self.rank)


AdapterConfig = Annotated[LoraConfig, Field()]
