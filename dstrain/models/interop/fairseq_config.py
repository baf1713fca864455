"""fairseq's flat settings of a transformer -> our configuration.

Settings that a checkpoint lacks take fairseq's defaults. What dstrain cannot represent is refused by name, with the value found
and what it would need, never read as something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dstrain.errors import ImportFormatError
from dstrain.models.config import (
    Activation,
    EncoderDecoderConfig,
    LearnedPosition,
    NoPosition,
    PlainEmbedding,
    SinusoidalPosition,
    StackConfig,
)

DEFAULTS: Mapping[str, Any] = {
    "encoder_embed_dim": 512,
    "encoder_ffn_embed_dim": 2048,
    "encoder_layers": 6,
    "encoder_attention_heads": 8,
    "encoder_normalize_before": False,
    "encoder_learned_pos": False,
    "encoder_layerdrop": 0.0,
    "decoder_layers": 6,
    "decoder_attention_heads": 8,
    "decoder_normalize_before": False,
    "decoder_learned_pos": False,
    "decoder_layerdrop": 0.0,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_fn": "relu",
    "share_all_embeddings": False,
    "share_decoder_input_output_embed": False,
    "no_token_positional_embeddings": False,
    "layernorm_embedding": False,
    "no_scale_embedding": False,
    "no_decoder_final_norm": False,
    "max_source_positions": 1024,
    "max_target_positions": 1024,
}
INHERITED = {
    "decoder_embed_dim": "encoder_embed_dim",
    "decoder_ffn_embed_dim": "encoder_ffn_embed_dim",
    "decoder_input_dim": "decoder_embed_dim",
    "decoder_output_dim": "decoder_embed_dim",
    "activation_dropout": "relu_dropout",
}
"""Settings that take another one's value when they are missing."""

ACTIVATION_NAMES: Mapping[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "linear": "linear",
}


@dataclass(frozen=True)
class Unsupported:
    """A setting that changes the model in a way that dstrain cannot represent. inert: whether a value changes nothing."""

    name: str
    needs: str
    inert: Callable[[Any], bool] = lambda value: not value or value == "linear"


UNSUPPORTED = (
    Unsupported("lora_args", "low-rank adapters"),
    Unsupported("rope_args", "rotary positions"),
    Unsupported("yarn_args", "YaRN positions"),
    Unsupported("alibi_args", "ALiBi attention biases"),
    Unsupported("encoder_recurrent_stacking", "layers that run at several depths", lambda value: value in {None, 0, 1}),
    Unsupported("decoder_recurrent_stacking", "layers that run at several depths", lambda value: value in {None, 0, 1}),
    Unsupported("encoder_factorized_embed_dim", "factorized embeddings"),
    Unsupported("decoder_factorized_embed_dim", "factorized embeddings"),
    Unsupported("decoder_output_activation_fn", "an activation before the projection"),
    Unsupported("encoder_use_glu", "gated feed-forward layers"),
    Unsupported("decoder_use_glu", "gated feed-forward layers"),
    Unsupported("encoder_use_rmsnorm", "RMS normalization"),
    Unsupported("decoder_use_rmsnorm", "RMS normalization"),
    Unsupported("encoder_kv_attention_heads", "grouped-query attention"),
    Unsupported("decoder_kv_attention_heads", "grouped-query attention"),
    Unsupported("adaptive_input", "adaptive input embeddings"),
    Unsupported("adaptive_softmax_cutoff", "an adaptive softmax"),
    Unsupported("no_cross_attention", "a decoder without cross-attention"),
    Unsupported("cross_self_attention", "attention over source and target at once"),
    Unsupported("merge_src_tgt_embed", "a merged vocabulary"),
    Unsupported("encoder_layers_to_keep", "pruned layers"),
    Unsupported("decoder_layers_to_keep", "pruned layers"),
    Unsupported("base_layers", "mixture-of-experts layers"),
    Unsupported("scale_attn", "norms inside attention"),
    Unsupported("scale_fc", "norms inside the feed-forward layer"),
    Unsupported("scale_heads", "scaled heads"),
    Unsupported("scale_resids", "scaled residuals"),
)


class Settings:
    """fairseq's model settings with its defaults filled in."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def __getitem__(self, name: str) -> Any:
        value = self._given.get(name)
        if value is not None:
            return value
        if name in INHERITED:
            return self[INHERITED[name]]
        return DEFAULTS.get(name, 0)


def convert_config(given: Mapping[str, Any], *, keeps_final_norm: Mapping[str, bool]) -> EncoderDecoderConfig:
    """Our configuration of a fairseq transformer.

    given: its settings. keeps_final_norm: for `encoder` and `decoder`, False where the checkpoint's format is so old that its
    pre-norm models had no final norm. ImportFormatError names what cannot be represented.
    """
    for option in UNSUPPORTED:
        if not option.inert(given.get(option.name)):
            raise refusal(option.name, given[option.name], f"it needs {option.needs}")
    settings = Settings(given)
    for name in ("decoder_embed_dim", "decoder_input_dim", "decoder_output_dim"):
        _require_equal(settings, name, "encoder_embed_dim")
    for name in ("normalize_before", "learned_pos"):
        _require_equal(settings, f"decoder_{name}", f"encoder_{name}")
    if settings["activation_fn"] not in ACTIVATION_NAMES:
        raise refusal("activation_fn", settings["activation_fn"], f"known are {', '.join(ACTIVATION_NAMES)}")
    pre = settings["encoder_normalize_before"]
    return EncoderDecoderConfig(
        model_dim=settings["encoder_embed_dim"],
        encoder=_stack(settings, "encoder", "auto" if keeps_final_norm["encoder"] or not pre else "no"),
        decoder=_stack(
            settings,
            "decoder",
            "auto" if not pre or (keeps_final_norm["decoder"] and not settings["no_decoder_final_norm"]) else "no",
        ),
        norm_order="pre" if pre else "post",
        activation=ACTIVATION_NAMES[settings["activation_fn"]],
        position=_position(settings),
        embedding=PlainEmbedding(
            scale=not settings["no_scale_embedding"], norm=settings["layernorm_embedding"], tie=_tie(settings)
        ),
        dropout=settings["dropout"],
        attention_dropout=settings["attention_dropout"],
        activation_dropout=settings["activation_dropout"],
        max_source_length=settings["max_source_positions"],
        max_target_length=settings["max_target_positions"],
    )


def refusal(name: str, value: object, reason: str) -> ImportFormatError:
    """The error for a setting that cannot be represented."""
    return ImportFormatError(f"the checkpoint has {name} = {value!r}, which dstrain cannot import: {reason}")


def _require_equal(settings: Settings, name: str, other: str) -> None:
    if settings[name] != settings[other]:
        raise refusal(name, settings[name], f"it differs from {other} = {settings[other]!r}")


def _stack(settings: Settings, side: str, final_norm: Literal["auto", "no"]) -> StackConfig:
    return StackConfig(
        depth=settings[f"{side}_layers"],
        num_heads=settings[f"{side}_attention_heads"],
        ffn_dim=settings[f"{side}_ffn_embed_dim"],
        layer_drop=settings[f"{side}_layerdrop"],
        final_norm=final_norm,
    )


def _position(settings: Settings) -> SinusoidalPosition | LearnedPosition | NoPosition:
    if settings["no_token_positional_embeddings"]:
        return NoPosition()
    return LearnedPosition() if settings["encoder_learned_pos"] else SinusoidalPosition()


def _tie(settings: Settings) -> Literal["all", "decoder", "none"]:
    if settings["share_all_embeddings"]:
        return "all"
    return "decoder" if settings["share_decoder_input_output_embed"] else "none"
