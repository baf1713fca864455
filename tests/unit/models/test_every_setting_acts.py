"""No field of the model's configuration is silently inert: changing it changes the model or what it computes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.models.config import EncoderDecoderConfig, LayerNormConfig, PlainEmbedding, StackConfig
from dstrain.models.factory import build_model
from dstrain.models.portable import to_portable
from tests.unit.models.build import VOCABULARY, sequences

STACK: dict[str, Any] = {"depth": 2, "num_heads": 2, "ffn_dim": 20}
BASE: dict[str, Any] = {
    "model_dim": 16,
    "encoder": StackConfig(**STACK),
    "decoder": StackConfig(**STACK),
    "position": {"kind": "learned"},
    "max_source_length": 20,
    "max_target_length": 20,
}
STACK_CHANGES = {"depth": 3, "num_heads": 4, "ffn_dim": 24, "layer_drop": 0.5, "final_norm": "yes"}
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("model_dim", {"model_dim": 20}),
    ("norm_order", {"norm_order": "pre"}),
    ("norm", {"norm": {"kind": "layer_norm", "eps": 0.1}}),
    ("activation", {"activation": "gelu"}),
    ("position", {"position": {"kind": "sinusoidal"}}),
    ("position", {"position": {"kind": "none"}}),
    ("embedding.scale", {"embedding": {"scale": False}}),
    ("embedding.norm", {"embedding": {"norm": True}}),
    ("embedding.tie", {"embedding": {"tie": "all"}}),
    ("embedding.tie", {"embedding": {"tie": "decoder"}}),
    ("dropout", {"dropout": 0.3}),
    ("attention_dropout", {"attention_dropout": 0.3}),
    ("activation_dropout", {"activation_dropout": 0.3}),
    ("max_source_length", {"max_source_length": 21}),
    ("max_target_length", {"max_target_length": 21}),
    *[
        (f"{side}.{field}", {side: StackConfig(**{**STACK, field: value})})
        for side in ("encoder", "decoder")
        for field, value in STACK_CHANGES.items()
    ],
]


def signature(config: EncoderDecoderConfig) -> tuple[dict[str, torch.Size], Tensor]:
    """Shapes of the weights, and the logits of a training step."""
    model = build_model(config, VOCABULARY, seed=1).train()
    torch.manual_seed(5)
    logits = model.project(model(sequences(5, 3), sequences(4, 4)).hidden)
    return {name: tensor.shape for name, tensor in to_portable(model).items()}, logits.detach()


@pytest.mark.parametrize(("field", "change"), CHANGES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_changed_field_changes_the_model(field: str, change: dict[str, Any]) -> None:
    shapes, logits = signature(EncoderDecoderConfig(**BASE))
    again_shapes, again = signature(EncoderDecoderConfig(**BASE))
    assert (shapes, logits.tolist()) == (again_shapes, again.tolist())
    changed_shapes, changed = signature(EncoderDecoderConfig(**{**BASE, **change}))
    assert changed_shapes != shapes or not torch.allclose(changed, logits)


def test_every_field_was_changed() -> None:
    fields = {field.split(".")[0] for field, _ in CHANGES}
    assert fields | {"kind"} == set(EncoderDecoderConfig.model_fields)
    assert set(STACK_CHANGES) == set(StackConfig.model_fields)
    assert {field.split(".")[1] for field, _ in CHANGES if field.startswith("embedding.")} | {"kind"} == set(
        PlainEmbedding.model_fields
    )
    assert set(LayerNormConfig.model_fields) == {"kind", "eps"}
