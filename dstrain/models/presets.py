"""Known shapes by name. A preset is a configuration like any other: `model_copy(update=...)` makes the next one."""

from __future__ import annotations

from types import MappingProxyType

from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, PlainEmbedding, StackConfig


def _encoder(depth: int, *, num_heads: int, ffn_dim: int) -> StackConfig:
    return StackConfig(depth=depth, num_heads=num_heads, ffn_dim=ffn_dim)


def _decoder(depth: int, *, num_heads: int, ffn_dim: int) -> DecoderStackConfig:
    return DecoderStackConfig(depth=depth, num_heads=num_heads, ffn_dim=ffn_dim)


PRESETS: MappingProxyType[str, EncoderDecoderConfig] = MappingProxyType(
    {
        "tiny": EncoderDecoderConfig(
            model_dim=128,
            encoder=_encoder(4, num_heads=4, ffn_dim=256),
            decoder=_decoder(4, num_heads=4, ffn_dim=256),
            embedding=PlainEmbedding(tie="all"),
            dropout=0.3,
        ),
        "iwslt": EncoderDecoderConfig(
            model_dim=512,
            encoder=_encoder(6, num_heads=4, ffn_dim=1024),
            decoder=_decoder(6, num_heads=4, ffn_dim=1024),
            dropout=0.3,
        ),
        "base": EncoderDecoderConfig(
            model_dim=512,
            encoder=_encoder(6, num_heads=8, ffn_dim=2048),
            decoder=_decoder(6, num_heads=8, ffn_dim=2048),
        ),
        "big": EncoderDecoderConfig(
            model_dim=1024,
            encoder=_encoder(6, num_heads=16, ffn_dim=4096),
            decoder=_decoder(6, num_heads=16, ffn_dim=4096),
            dropout=0.3,
        ),
        "it2": EncoderDecoderConfig(
            model_dim=1024,
            encoder=_encoder(18, num_heads=16, ffn_dim=8192),
            decoder=_decoder(18, num_heads=16, ffn_dim=8192),
            norm_order="pre",
            activation="gelu",
        ),
        "it2_dist": EncoderDecoderConfig(
            model_dim=512,
            encoder=_encoder(18, num_heads=8, ffn_dim=2048),
            decoder=_decoder(18, num_heads=8, ffn_dim=2048),
            norm_order="pre",
            activation="gelu",
            embedding=PlainEmbedding(norm=True, tie="decoder"),
        ),
    }
)
"""tiny: Wu et al. 2021. iwslt, base, big: Vaswani et al. 2017 as fairseq has them. it2, it2_dist: IndicTrans2 and its student."""
