"""Context extension: what it changes of a configuration, and which models it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import TypeAdapter

from dstrain.errors import ArgumentError
from dstrain.models.config import ModelConfig
from dstrain.models.extend import extended_model

STACK = {"depth": 1, "num_heads": 2, "ffn_dim": 8}
BOTH = {"kind": "encoder_decoder", "model_dim": 16, "encoder": STACK, "decoder": STACK}
ROTARY = {"position": {"kind": "rotary", "theta": 500.0}, "max_target_length": 256}


def model(tree: dict[str, Any]) -> ModelConfig:
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python(tree)
    return config


DECODER = model({"kind": "decoder_only", "model_dim": 16, "decoder": STACK, **ROTARY})


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        ("linear", {"kind": "linear", "factor": 4.0}),
        ("ntk", {"kind": "ntk", "factor": 4.0}),
        ("yarn", {"kind": "yarn", "factor": 4.0, "original_length": 256}),
    ],
)
def test_scaling_and_lengths_change_and_nothing_else(kind: Any, scaling: dict[str, Any]) -> None:
    expected = {"position": {**ROTARY["position"], "scaling": scaling}, "max_target_length": 1024}
    assert extended_model(DECODER, kind=kind, factor=4) == model({**DECODER.model_dump(), **expected})


def test_each_side_grows_from_what_it_was_trained_with() -> None:
    """And no limit is lowered, which may be longer than the training was."""
    pair = model({**BOTH, **ROTARY, "max_source_length": 100})
    assert extended_model(pair, kind="linear", factor=2.5).limits[:2] == (250, 640)
    trained = extended_model(pair, kind="yarn", factor=1.5, original_length=120)
    assert trained.limits[:2] == (150, 256)
    assert trained.position.model_dump()["scaling"]["original_length"] == 120


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"factor": 0.5}, "factor = 0.5 is not a number from 1 on; it is the new length divided by the old one"),
        ({}, {"factor": float("nan")}, "factor = nan is not a number from 1 on"),
        (
            {},
            {"original_length": 300},
            "original_length = 300, but the model reads 256 tokens and was trained with no more",
        ),
        (
            {"position": {"kind": "rotary", "scaling": {"kind": "linear", "factor": 2}}},
            {},
            "position.scaling.kind = linear: the model is extended already; name the one that it was made from",
        ),
        (
            {"position": {"kind": "learned"}},
            {},
            "position.kind = learned has a trained vector for each position, and none beyond the last; only",
        ),
        (
            {"position": {"kind": "alibi"}},
            {},
            "alibi falls with distance at any length and needs no extension; train on with longer",
        ),
        (
            {"position": {"kind": "sinusoidal"}},
            {},
            "sinusoidal has no rotation that could be scaled; train on with longer text: ",
        ),
        ({"position": {"kind": "none"}}, {}, "position.kind = none has no rotation that could be scaled; train on"),
    ],
)
def test_what_cannot_be_extended_is_named(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        extended_model(model({**DECODER.model_dump(), **changes}), **{"kind": "yarn", "factor": 4, **options})
