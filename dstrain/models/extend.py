"""Context extension of a model with rotary positions: from configuration to configuration, as no weight depends on a length.

    linear  positions divided by the factor (Chen et al. 2023)
    ntk     a larger base theta ("NTK-aware" interpolation, bloc97 2023)
    yarn    low frequencies divided, high ones kept, queries and keys scaled (Peng et al. 2023)

All three change what short sequences compute, too, so an extended model wants some training at its new lengths. Torch-free.
"""

from __future__ import annotations

import math
from typing import Literal, assert_never

from pydantic import TypeAdapter

from dstrain.errors import ArgumentError
from dstrain.models.config import ModelConfig
from dstrain.models.position_config import LinearScaling, NoScaling, NtkScaling, RotaryPosition, YarnScaling

ExtensionKind = Literal["linear", "ntk", "yarn"]


def extended_model(model: ModelConfig, *, kind: ExtensionKind, factor: float, original_length: int | None = None) -> ModelConfig:
    """The model that reads `factor` times as many tokens.

    original_length: tokens that it was trained with, on either side; None = the longest that it reads. No limit is lowered.
    ArgumentError if the model has no rotary positions or is extended already, or for a factor or length that is impossible.
    """
    check_factor(factor)
    position = _unscaled(model)
    limits: dict[str, int] = model.model_dump(include={"max_source_length", "max_target_length"})
    longest = max(limits.values())
    original = original_length or longest
    if original > longest:
        raise ArgumentError(
            f"original_length = {original}, but the model reads {longest} tokens and was trained with no more; lower it"
        )
    lengths = {name: max(limit, math.floor(factor * min(limit, original))) for name, limit in limits.items()}
    scaled = position.model_copy(update={"scaling": _scaling(kind, factor, original)})
    extended: ModelConfig = TypeAdapter(ModelConfig).validate_python({**model.model_dump(), **lengths, "position": scaled})
    return extended


def check_factor(factor: float) -> float:
    """The factor. ArgumentError unless it is a number from 1 on."""
    if not 1 <= factor < math.inf:
        raise ArgumentError(f"factor = {factor:g} is not a number from 1 on; it is the new length divided by the old one")
    return factor


def _scaling(kind: ExtensionKind, factor: float, original_length: int) -> LinearScaling | NtkScaling | YarnScaling:
    match kind:
        case "linear":
            return LinearScaling(factor=factor)
        case "ntk":
            return NtkScaling(factor=factor)
        case "yarn":
            return YarnScaling(factor=factor, original_length=original_length)
        case other:
            assert_never(other)


def _unscaled(model: ModelConfig) -> RotaryPosition:
    """The rotary positions of a model that is not extended yet."""
    position = model.position
    train_on = "train on with longer text: `dstrain train RECIPE --base BUNDLE` with larger lengths in RECIPE's model"
    match position:
        case RotaryPosition(scaling=NoScaling()):
            return position
        case RotaryPosition():
            raise ArgumentError(
                f"position.scaling.kind = {position.scaling.kind}: the model is extended already; "
                "name the one that it was made from"
            )
        case _ if position.kind == "learned":
            raise ArgumentError(
                "position.kind = learned has a trained vector for each position, and none beyond the last; only models with "
                "position.kind: rotary are extended"
            )
        case _ if position.kind == "alibi":
            raise ArgumentError(f"position.kind = alibi falls with distance at any length and needs no extension; {train_on}")
        case _:
            raise ArgumentError(f"position.kind = {position.kind} has no rotation that could be scaled; {train_on}")
