"""Small models and sequences for the tests of this package."""

import itertools
import random
from typing import Any

import torch
from pydantic import TypeAdapter

from dstrain.batch import Sequences
from dstrain.models.config import (
    DecoderOnlyConfig,
    DecoderStackConfig,
    EncoderDecoderConfig,
    ModelConfig,
    PlainEmbedding,
    StackConfig,
    VocabularySizes,
)
from dstrain.models.factory import Model, Projections, build_model
from dstrain.models.position_config import LearnedPosition, NoPosition, PositionConfig, SinusoidalPosition

VOCABULARY = VocabularySizes(source=41, target=41)
POSITIONS: list[PositionConfig] = [SinusoidalPosition(), LearnedPosition(), NoPosition()]


def small_config(**changes: Any) -> EncoderDecoderConfig:
    """3 + 2 layers of 24 features; any field may be changed."""
    fields: dict[str, Any] = {
        "model_dim": 24,
        "encoder": StackConfig(depth=3, num_heads=3, ffn_dim=40),
        "decoder": DecoderStackConfig(depth=2, num_heads=4, ffn_dim=56),
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
    config: EncoderDecoderConfig | DecoderOnlyConfig | None = None, *, projections: Projections = "fused", seed: int = 1
) -> Model:
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


def random_config(seed: int) -> EncoderDecoderConfig | DecoderOnlyConfig:
    """A model of parts drawn at random: every kind of every part with every other."""
    draw = random.Random(seed)
    scaling = draw.choice(
        [
            {"kind": "none"},
            {"kind": "linear", "factor": 2.5},
            {"kind": "dynamic_ntk", "original_length": 4, "factor": 1.5},
            {"kind": "yarn", "original_length": 8, "factor": 4.0},
            {"kind": "dynamic_yarn", "original_length": 8, "from_length": 5},
        ]
    )
    position = draw.choice(
        [
            {"kind": "sinusoidal"},
            {"kind": "learned"},
            {"kind": "none"},
            {"kind": "alibi"},
            {
                "kind": "rotary",
                "theta": draw.choice([50.0, 10000.0]),
                "fraction": draw.choice([0.5, 1.0]),
                "layout": draw.choice(["half_split", "interleaved"]),
                "scaling": scaling,
            },
        ]
    )
    decoder_only = draw.random() < 0.3
    embedding = {
        "kind": draw.choice(["plain", "factorized"]),
        "scale": draw.random() < 0.5,
        "norm": draw.random() < 0.5,
        "tie": draw.choice(["decoder", "none"] if decoder_only else ["all", "decoder", "none"]),
    }
    if embedding["kind"] == "factorized":
        embedding |= {"dim": 10, "activation": draw.choice(["linear", "gelu"])}
        if not decoder_only and embedding["tie"] != "all" and seed % 3 == 0:
            embedding["sides"] = ("source", "target")[seed % 2]
    if position["kind"] == "alibi" and not decoder_only:
        position["encoder"] = draw.choice(["symmetric", "asymmetric", "none"])

    def stack() -> dict[str, Any]:
        heads, depth = draw.choice([2, 4, 6]), draw.choice([1, 2, 3])
        return {
            "depth": depth,
            "unique_layers": draw.choice([None, 1, max(1, depth - 1)]),
            "num_heads": heads,
            "num_kv_heads": draw.choice([None, 1, 2]),
            "ffn_dim": draw.choice([20, 33]),
            "feed_forward": draw.choice(["plain", "gated"]),
            "final_norm": draw.choice(["auto", "yes", "no"]),
        }

    tree: dict[str, Any] = {
        "kind": "decoder_only" if decoder_only else "encoder_decoder",
        "model_dim": 48,
        "norm_order": draw.choice(["pre", "post"]),
        "norm": {"kind": draw.choice(["layer_norm", "rms_norm"])},
        "activation": draw.choice(["relu", "gelu", "gelu_tanh", "silu", "tanh"]),
        "position": position,
        "embedding": embedding,
        "decoder": {**stack(), "output_activation": draw.choice([None, "gelu", "tanh"])},
        "dropout": 0.2,
        "max_target_length": 40,
    }
    if not decoder_only:
        tree |= {"encoder": stack(), "max_source_length": 40}
        tree["decoder"]["num_cross_kv_heads"] = draw.choice([None, 1, 2])
    if draw.random() < 0.4:
        width = 10 if embedding["kind"] == "factorized" and embedding.get("sides") != "source" else 48
        embedding["output_dim"] = 17 if embedding["tie"] == "none" else width
    config: EncoderDecoderConfig | DecoderOnlyConfig = TypeAdapter(ModelConfig).validate_python(tree)
    return config
