"""Rotary positions and their scalings equal Transformers' Llama: frequencies, and queries and keys as they come out."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from dstrain.models.position_config import RotaryPosition
from dstrain.models.rotary import build_rotary

transformers = pytest.importorskip("transformers")
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb  # noqa: E402

HEAD_DIM, ORIGINAL = 16, 32
THETA = 1000.0
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "none"}, {"rope_type": "default"}),
    ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"kind": "ntk", "factor": 4.0}, {"rope_type": "default", "rope_theta": THETA * 4 ** (HEAD_DIM / (HEAD_DIM - 2))}),
    ({"kind": "dynamic_ntk", "factor": 2.0, "original_length": ORIGINAL}, {"rope_type": "dynamic", "factor": 2.0}),
    (
        {"kind": "yarn", "factor": 4.0, "original_length": ORIGINAL},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    ),
    (
        {"kind": "yarn", "factor": 3.0, "original_length": ORIGINAL, "beta_fast": 8.0, "beta_slow": 2.0},
        {
            "rope_type": "yarn",
            "factor": 3.0,
            "original_max_position_embeddings": ORIGINAL,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
        },
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), CASES, ids=lambda part: part.get("kind", ""))
@pytest.mark.parametrize("length", [5, 100])
def test_turned_queries_and_keys(ours: dict[str, Any], theirs: dict[str, Any], length: int) -> None:
    config = transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_theta": THETA, **theirs},
    )
    query, key = torch.randn(2, 4, length, HEAD_DIM), torch.randn(2, 2, length, HEAD_DIM)
    cos, sin = LlamaRotaryEmbedding(config)(query, torch.arange(length)[None])
    expected = apply_rotary_pos_emb(query, key, cos, sin)

    position = TypeAdapter(RotaryPosition).validate_python({"kind": "rotary", "theta": THETA, "scaling": ours})
    rotation = build_rotary(position, HEAD_DIM).rotation(0, length, lambda: torch.tensor([[length]]), query)
    for found, wanted in zip((rotation(query), rotation(key)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
