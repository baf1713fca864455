"""Small models and sequences for the tests of this room."""

import itertools
from typing import Any

import torch

from dstrain.batch import Sequences
from dstrain.models.config import (
    EncoderDecoderConfig,
    LearnedPosition,
    NoPosition,
    PlainEmbedding,
    PositionConfig,
    SinusoidalPosition,
    StackConfig,
    VocabularySizes,
)
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.factory import Projections, build_model

VOCABULARY = VocabularySizes(source=41, target=41)
POSITIONS: list[PositionConfig] = [SinusoidalPosition(), LearnedPosition(), NoPosition()]


def small_config(**changes: Any) -> EncoderDecoderConfig:
    """3 + 2 layers of 24 features; any field may be changed."""
    fields: dict[str, Any] = {
        "model_dim": 24,
        "encoder": StackConfig(depth=3, num_heads=3, ffn_dim=40),
        "decoder": StackConfig(depth=2, num_heads=4, ffn_dim=56),
        "dropout": 0.2,
        "max_source_length": 32,
        "max_target_length": 32,
    }
    return EncoderDecoderConfig(**{**fields, **changes})


def variants() -> list[EncoderDecoderConfig]:
    """Norm orders x positions x tyings, with norm, scale and activation changing along."""
    return [
        small_config(
            norm_order=order,
            position=position,
            embedding=PlainEmbedding(tie=tie, norm=number % 2 == 0, scale=number % 3 > 0),
            activation=("relu", "gelu", "silu", "tanh")[number % 4],
        )
        for number, (order, position, tie) in enumerate(itertools.product(("pre", "post"), POSITIONS, ("all", "decoder", "none")))
    ]


def name_of(config: EncoderDecoderConfig) -> str:
    """What a variant is called in a test's name."""
    return f"{config.norm_order}-{config.position.kind}-{config.embedding.tie}"


def small_model(
    config: EncoderDecoderConfig | None = None, *, projections: Projections = "fused", seed: int = 1
) -> EncoderDecoder:
    """In evaluation mode, with weights large enough to make differences show."""
    model = build_model(config or small_config(), VOCABULARY, projections=projections, seed=seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def sequences(*lengths: int, seed: int = 1, width: int | None = None) -> Sequences:
    """Rows of random tokens of these lengths, padded with 1."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(*lengths, 1)
    tokens = torch.randint(4, 41, (len(lengths), width), generator=generator)
    for row, length in enumerate(lengths):
        tokens[row, length:] = 1
    return Sequences(tokens, torch.tensor(lengths))
