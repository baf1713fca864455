"""The configurations that CTranslate2 has no layers for, and what becomes of others that it writes down differently."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from dstrain.models.config import ModelConfig, StackConfig
from dstrain.models.position_config import AlibiPosition

ACTIVATION_ENUM = MappingProxyType({"relu": "RELU", "gelu": "GELU", "gelu_tanh": "GELUTanh", "silu": "SWISH", "tanh": "Tanh"})
"""Ours -> its name in `ctranslate2.specs.Activation`."""
NORMS = {"layer_norm", "rms_norm"}
LENGTH_SCALINGS = {"dynamic_ntk", "dynamic_yarn"}
"""Rotary scalings whose frequencies follow the length of a sequence."""


def unsupported(config: ModelConfig) -> Iterator[str]:
    """Each key of a model that CTranslate2 cannot represent, with its value and the reason."""
    position, output = config.position, config.decoder.output_activation
    if config.activation not in ACTIVATION_ENUM:
        yield f"model.activation = {config.activation} (it has {', '.join(ACTIVATION_ENUM)})"
    if config.norm.kind not in NORMS:
        yield f"model.norm.kind = {config.norm.kind} (it has {', '.join(sorted(NORMS))})"
    if output not in (None, "linear"):
        yield f"model.decoder.output_activation = {output} (its output layer is linear)"
    if position.kind == "rotary" and position.scaling.kind in LENGTH_SCALINGS:
        yield f"model.position.scaling.kind = {position.scaling.kind} (its frequencies do not follow the length of a sequence)"
    if isinstance(position, AlibiPosition) and position.encoder != "none":
        yield f"model.position.kind = alibi with encoder = {position.encoder} (its encoder has no ALiBi)"


def stacks_of(config: ModelConfig) -> dict[str, StackConfig]:
    """By name."""
    decoder: dict[str, StackConfig] = {"decoder": config.decoder}
    return {"encoder": config.encoder, **decoder} if config.kind == "encoder_decoder" else decoder


def changes(config: ModelConfig) -> Iterator[str]:
    """What the export writes otherwise than the bundle, with the same logits, and what a reader must know."""
    for name, stack in stacks_of(config).items():
        if stack.unique_layers not in (None, stack.depth):
            yield f"{name}: {stack.unique_layers} layers in {stack.depth} passes are {stack.depth} layers that share weights"
    embedding = config.embedding
    if embedding.kind == "factorized" or embedding.output_dim is not None:
        yield f"the factors of embeddings and output are multiplied: matrices of {config.model_dim} columns"
    if config.position.kind == "rotary" and config.position.scaling.kind == "yarn":
        yield (
            "YaRN: CTranslate2 reads its frequencies in float32: load the model with compute_type float32, int8 or int8_float32"
        )
