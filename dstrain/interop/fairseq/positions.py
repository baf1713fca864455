"""Positions of fairseq's descendants: what their settings say, and what their code made of it.

Two generations share names. The earlier wrote `type` into `rope_args` and turned whole heads by halves; the later wrote `theta`
and turned the first half of each head by neighbors. The earlier's ALiBi never reached the encoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dstrain.errors import ImportFormatError
from dstrain.log import logger
from dstrain.models.config import (
    AlibiPosition,
    DecoderOnlyPositionConfig,
    DynamicNtkScaling,
    DynamicYarnScaling,
    LearnedPosition,
    LinearScaling,
    NoPosition,
    NoScaling,
    PositionConfig,
    RotaryPosition,
    SinusoidalPosition,
    YarnScaling,
)


def refusal(name: str, value: object, reason: str) -> ImportFormatError:
    """The error for a setting that cannot be represented."""
    return ImportFormatError(f"the checkpoint has {name} = {value!r}, which dstrain cannot import: {reason}")


def convert_position(given: Mapping[str, Any], *, added: bool, learned: bool) -> PositionConfig:
    """The positions of a fairseq model.

    given: its settings, with `rope_args`, `yarn_args` and `alibi_args` as JSON. added: whether position embeddings are added.
    ImportFormatError names what cannot be represented.
    """
    rope, yarn, alibi = (_arguments(given, name) for name in ("rope_args", "yarn_args", "alibi_args"))
    turned = [name for name, found in (("rope_args", rope), ("yarn_args", yarn)) if found is not None]
    if added and turned:
        raise refusal(turned[0], given[turned[0]], "positions are added to the embeddings besides")
    if rope is not None:
        return _rotary(rope)
    if yarn is not None:
        return _yarn(yarn)
    if alibi is not None and "type" in alibi:
        if added:
            raise refusal("alibi_args", given["alibi_args"], "positions are added to the embeddings besides")
        return AlibiPosition(encoder="asymmetric" if alibi["type"] == "asymmetrical" else "symmetric")
    if alibi is not None and not added:
        return AlibiPosition(encoder="none")
    if not added:
        return NoPosition()
    return LearnedPosition() if learned else SinusoidalPosition()


def convert_added_position(*, added: bool, learned: bool) -> DecoderOnlyPositionConfig:
    """The positions of a fairseq language model, which has no others."""
    if not added:
        return NoPosition()
    return LearnedPosition() if learned else SinusoidalPosition()


def _arguments(given: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    value = given.get(name)
    if not value:
        return None
    try:
        content = json.loads(value) if isinstance(value, str) else dict(value)
    except ValueError as error:
        raise refusal(name, value, f"it is no JSON object ({error})") from error
    if not isinstance(content, dict):
        raise refusal(name, value, "it is no JSON object")
    return content


def _rotary(rope: Mapping[str, Any]) -> RotaryPosition:
    if "type" not in rope:
        factor = float(rope.get("scaling_factor", 1.0))
        scaling = NoScaling() if factor == 1 else LinearScaling(factor=factor)
        return RotaryPosition(theta=rope.get("theta", 10000), fraction=0.5, layout="interleaved", scaling=scaling)
    theta, length = rope.get("base", 10000), int(rope.get("max_position_embeddings", 2048))
    match rope["type"]:
        case "vanilla":
            return RotaryPosition(theta=theta)
        case "linear":
            return RotaryPosition(theta=theta, scaling=LinearScaling(factor=rope.get("scaling_factor", 1.0)))
        case "dynamic":
            return RotaryPosition(theta=theta, scaling=DynamicNtkScaling(original_length=length))
    raise refusal("rope_args", rope, "its type is none of vanilla, linear, dynamic")


def _yarn(yarn: Mapping[str, Any]) -> RotaryPosition:
    if yarn.get("type") not in {"vanilla", "dynamic"}:
        raise refusal("yarn_args", yarn, "its type is none of vanilla, dynamic")
    if "beta_slow" not in yarn:
        logger.warning(
            "yarn_args name no beta_slow: 2 is taken, the predecessor's default until 2024-06-11; from then on it was 1, so set "
            "model.position.scaling.beta_slow by hand if the model was trained later"
        )
    original, reached = (
        int(yarn.get(name, default))
        for name, default in (("original_max_position_embeddings", 256), ("max_position_embeddings", 2048))
    )
    constants = {
        "original_length": original,
        "beta_fast": yarn.get("beta_fast", 32),
        "beta_slow": yarn.get("beta_slow", 2),
        "extrapolation_factor": yarn.get("extrapolation_factor", 1.0),
        "attention_factor": yarn.get("attn_factor", 1.0),
    }
    theta = yarn.get("base", 10000)
    if yarn["type"] == "vanilla":
        return RotaryPosition(theta=theta, scaling=YarnScaling(factor=yarn.get("scale", 1.0), **constants))
    factor = max(1.0, reached / original) if yarn.get("finetuned") else 1.0
    return RotaryPosition(theta=theta, scaling=DynamicYarnScaling(factor=factor, from_length=reached, **constants))
