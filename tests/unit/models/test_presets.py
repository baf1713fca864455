"""Presets beside the predecessor's table of architectures, written down here once more, and their sizes beside a formula."""

from typing import NamedTuple

import pytest
import torch

from dstrain.models.config import EncoderDecoderConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.presets import PRESETS


class Row(NamedTuple):
    """An architecture as its documentation gives it."""

    layers: int
    dim: int
    ffn: int
    heads: int
    norm: str
    activation: str
    embedding_norm: bool
    tie: str
    dropout: float
    position: str = "sinusoidal"


IT2 = Row(18, 1024, 8192, 16, "pre", "gelu", False, "none", 0.1)
IT2_DIST = Row(18, 512, 2048, 8, "pre", "gelu", True, "decoder", 0.1)
TABLE = {
    "tiny": Row(4, 128, 256, 4, "post", "relu", False, "all", 0.3),
    "iwslt": Row(6, 512, 1024, 4, "post", "relu", False, "none", 0.3),
    "base": Row(6, 512, 2048, 8, "post", "relu", False, "none", 0.1),
    "big": Row(6, 1024, 4096, 16, "post", "relu", False, "none", 0.3),
    "it2": IT2,
    "it2_dist": IT2_DIST,
    "roformer_it2": IT2._replace(position="rotary"),
    "roformer_it2_dist": IT2_DIST._replace(position="rotary"),
    "aliformer_it2": IT2._replace(position="alibi"),
    "aliformer_it2_dist": IT2_DIST._replace(position="alibi"),
    "transformer_2x": Row(6, 1024, 4096, 16, "post", "relu", False, "none", 0.1),
    "transformer_4x": Row(6, 1536, 4096, 16, "post", "relu", False, "none", 0.1),
    "transformer_9x": Row(6, 2048, 8192, 16, "post", "relu", False, "none", 0.1),
    "transformer_12e12d_9xeq": Row(12, 1536, 4096, 16, "post", "relu", False, "none", 0.1),
    "transformer_18_18": Row(18, 1024, 8192, 16, "pre", "relu", False, "none", 0.1),
    "transformer_24_24": Row(24, 1024, 8192, 16, "pre", "relu", False, "none", 0.1),
    "transformer_base18L": Row(18, 512, 2048, 8, "pre", "relu", True, "none", 0.1),
}
COUNTED = {"base": 44_236_800, "big": 176_553_984, "iwslt": 31_641_600, "it2": 831_410_176, "it2_dist": 132_485_120}
"""By the predecessor, with 64 source and 64 target tokens."""


def read(config: EncoderDecoderConfig) -> Row:
    """What the table says, of a configuration."""
    assert config.encoder.model_dump() == {name: config.decoder.model_dump()[name] for name in config.encoder.model_dump()}
    stack, embedding = config.encoder, config.embedding
    sizes = stack.depth, config.model_dim, stack.ffn_dim, stack.num_heads
    looks = config.norm_order, config.activation, embedding.norm, embedding.tie
    return Row(*sizes, *looks, config.dropout, config.position.kind)


def parameters(row: Row, types: int) -> int:
    """Biases everywhere but in the vocabulary projection; two norms in a layer of the encoder, three in one of the decoder."""
    dim = row.dim
    attention, ffn, norm = 4 * (dim * dim + dim), 2 * dim * row.ffn + row.ffn + dim, 2 * dim
    layers = row.layers * ((attention + ffn + 2 * norm) + (2 * attention + ffn + 3 * norm))
    norms = 2 * norm * ((row.norm == "pre") + row.embedding_norm)
    return layers + norms + {"none": 3, "decoder": 2, "all": 1}[row.tie] * types * dim


def test_every_preset_is_in_the_table() -> None:
    assert {name: read(config) for name, config in PRESETS.items()} == TABLE


@pytest.mark.parametrize("name", TABLE)
def test_nothing_else_is_set(name: str) -> None:
    """Widths, norms, activation, tying, dropout and positions apart, a preset is what an empty configuration is."""
    row, config = TABLE[name], PRESETS[name]
    stack = {"depth": row.layers, "num_heads": row.heads, "ffn_dim": row.ffn}
    expected = EncoderDecoderConfig.model_validate(
        {
            "model_dim": row.dim,
            "encoder": stack,
            "decoder": stack,
            "norm_order": row.norm,
            "activation": row.activation,
            "embedding": {"kind": "plain", "norm": row.embedding_norm, "tie": row.tie},
            "dropout": row.dropout,
            "position": {"kind": row.position},
        }
    )
    assert config == expected


@pytest.mark.parametrize("name", TABLE)
def test_the_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build_model(PRESETS[name], VocabularySizes(source=64, target=64), seed=None)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == parameters(TABLE[name], 64)
    assert counted == COUNTED.get(name, counted)
