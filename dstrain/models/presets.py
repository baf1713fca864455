"""Known shapes by name. A preset is a configuration like any other: `model_copy(update=...)` makes the next one."""

from __future__ import annotations

from types import MappingProxyType

from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, PlainEmbedding, StackConfig
from dstrain.models.position_config import AlibiPosition, RotaryPosition


def _shape(depth: int, model_dim: int, ffn_dim: int, num_heads: int) -> EncoderDecoderConfig:
    """The same stack on both sides; all else as Vaswani et al. have it."""
    return EncoderDecoderConfig(
        model_dim=model_dim,
        encoder=StackConfig(depth=depth, num_heads=num_heads, ffn_dim=ffn_dim),
        decoder=DecoderStackConfig(depth=depth, num_heads=num_heads, ffn_dim=ffn_dim),
    )


_PRE_NORM_GELU = {"norm_order": "pre", "activation": "gelu"}
_IT2 = _shape(18, 1024, 8192, 16).model_copy(update=_PRE_NORM_GELU)
_IT2_DIST = _shape(18, 512, 2048, 8).model_copy(update={**_PRE_NORM_GELU, "embedding": PlainEmbedding(norm=True, tie="decoder")})
_ROTARY, _ALIBI = {"position": RotaryPosition()}, {"position": AlibiPosition()}

PRESETS: MappingProxyType[str, EncoderDecoderConfig] = MappingProxyType(
    {
        "tiny": _shape(4, 128, 256, 4).model_copy(update={"embedding": PlainEmbedding(tie="all"), "dropout": 0.3}),
        "iwslt": _shape(6, 512, 1024, 4).model_copy(update={"dropout": 0.3}),
        "base": _shape(6, 512, 2048, 8),
        "big": _shape(6, 1024, 4096, 16).model_copy(update={"dropout": 0.3}),
        "it2": _IT2,
        "it2_dist": _IT2_DIST,
        "roformer_it2": _IT2.model_copy(update=_ROTARY),
        "roformer_it2_dist": _IT2_DIST.model_copy(update=_ROTARY),
        "aliformer_it2": _IT2.model_copy(update=_ALIBI),
        "aliformer_it2_dist": _IT2_DIST.model_copy(update=_ALIBI),
        "transformer_2x": _shape(6, 1024, 4096, 16),
        "transformer_4x": _shape(6, 1536, 4096, 16),
        "transformer_9x": _shape(6, 2048, 8192, 16),
        "transformer_12e12d_9xeq": _shape(12, 1536, 4096, 16),
        "transformer_18_18": _shape(18, 1024, 8192, 16).model_copy(update={"norm_order": "pre"}),
        "transformer_24_24": _shape(24, 1024, 8192, 16).model_copy(update={"norm_order": "pre"}),
        "transformer_base18L": _shape(18, 512, 2048, 8).model_copy(
            update={"norm_order": "pre", "embedding": PlainEmbedding(norm=True)}
        ),
    }
)
"""tiny: Wu et al. 2021. iwslt, base, big: Vaswani et al. 2017 as fairseq has them. The rest are IndicTrans2's shapes.

it2, it2_dist: the model and its student, by their fork of fairseq; roformer, aliformer: with rotary positions and ALiBi.
transformer_*: the plug-in that they were trained with before. Its names give only widths, depths and norms; trainings gave the
activation besides.
"""
