"""fairseq's flat settings of a transformer -> our configuration.

Settings that a checkpoint lacks take fairseq's defaults. What dstrain cannot represent is refused by name, with the value found
and what it would need, never read as something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dstrain.interop.fairseq.positions import convert_added_position, convert_position, refusal
from dstrain.models.config import (
    Activation,
    DecoderOnlyConfig,
    DecoderOnlyStackConfig,
    DecoderStackConfig,
    EncoderDecoderConfig,
    FactorizedEmbedding,
    LayerNormConfig,
    NormConfig,
    PlainEmbedding,
    RmsNormConfig,
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
    """Our configuration of a fairseq encoder-decoder transformer.

    given: its settings. keeps_final_norm: for `encoder` and `decoder`, False where the checkpoint's format is so old that its
    pre-norm models had no final norm. ImportFormatError names what cannot be represented.
    """
    settings = _supported(given)
    for name in ("decoder_embed_dim", "decoder_input_dim", "decoder_output_dim"):
        _require_equal(settings, name, "encoder_embed_dim")
    for name in ("normalize_before", "learned_pos", "use_rmsnorm", "factorized_embed_dim"):
        _require_equal(settings, f"decoder_{name}", f"encoder_{name}")
    pre = settings["encoder_normalize_before"]
    keeps_last = keeps_final_norm["decoder"] and not settings["no_decoder_final_norm"]
    return EncoderDecoderConfig(
        model_dim=settings["encoder_embed_dim"],
        encoder=StackConfig(**_stack(settings, "encoder", keeps_final_norm["encoder"] or not pre)),
        decoder=DecoderStackConfig(
            **_stack(settings, "decoder", keeps_last or not pre), output_activation=_output_activation(settings)
        ),
        norm_order="pre" if pre else "post",
        norm=_norm(settings),
        activation=_activation("activation_fn", settings["activation_fn"]),
        position=convert_position(
            given, added=not settings["no_token_positional_embeddings"], learned=settings["encoder_learned_pos"]
        ),
        embedding=_embedding(settings),
        dropout=settings["dropout"],
        attention_dropout=settings["attention_dropout"],
        activation_dropout=settings["activation_dropout"],
        max_source_length=settings["max_source_positions"],
        max_target_length=settings["max_target_positions"],
    )


def convert_language_model_config(given: Mapping[str, Any], *, keeps_final_norm: bool) -> DecoderOnlyConfig:
    """Our configuration of fairseq's `transformer_lm`. ImportFormatError as `convert_config`."""
    settings = _supported({**given, "encoder_embed_dim": given.get("decoder_embed_dim")})
    for name in ("decoder_input_dim", "decoder_output_dim"):
        _require_equal(settings, name, "decoder_embed_dim")
    pre = settings["decoder_normalize_before"]
    keeps = not pre or (keeps_final_norm and not settings["no_decoder_final_norm"])
    length = given.get("max_target_positions") or given.get("tokens_per_sample") or settings["max_target_positions"]
    return DecoderOnlyConfig(
        model_dim=settings["decoder_embed_dim"],
        decoder=DecoderOnlyStackConfig(**_stack(settings, "decoder", keeps), output_activation=_output_activation(settings)),
        norm_order="pre" if pre else "post",
        norm=_norm(settings),
        activation=_activation("activation_fn", settings["activation_fn"]),
        position=convert_added_position(
            added=not settings["no_token_positional_embeddings"], learned=settings["decoder_learned_pos"]
        ),
        embedding=_embedding(settings),
        dropout=settings["dropout"],
        attention_dropout=settings["attention_dropout"],
        activation_dropout=settings["activation_dropout"],
        max_target_length=length,
    )


def _supported(given: Mapping[str, Any]) -> Settings:
    for option in UNSUPPORTED:
        if not option.inert(given.get(option.name)):
            raise refusal(option.name, given[option.name], f"it needs {option.needs}")
    return Settings(given)


def _require_equal(settings: Settings, name: str, other: str) -> None:
    if settings[name] != settings[other]:
        raise refusal(name, settings[name], f"it differs from {other} = {settings[other]!r}")


def _activation(name: str, value: str) -> Activation:
    if value not in ACTIVATION_NAMES:
        raise refusal(name, value, f"known are {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[value]


def _output_activation(settings: Settings) -> Activation | None:
    value = settings["decoder_output_activation_fn"]
    return _activation("decoder_output_activation_fn", value) if value else None


def _stack(settings: Settings, side: str, keeps_final_norm: bool) -> dict[str, Any]:
    """Keys of a stack's configuration. With recurrent stacking, one layer runs so many times, whatever `layers` says."""
    passes = settings[f"{side}_recurrent_stacking"]
    grouped = "gqa" in str(settings["attn_implementation"])
    return {
        "depth": passes or settings[f"{side}_layers"],
        "unique_layers": 1 if passes else None,
        "num_heads": settings[f"{side}_attention_heads"],
        "num_kv_heads": settings[f"{side}_kv_attention_heads"] or None if grouped else None,
        "ffn_dim": settings[f"{side}_ffn_embed_dim"],
        "feed_forward": "gated" if settings[f"{side}_use_glu"] else "plain",
        "layer_drop": settings[f"{side}_layerdrop"],
        "final_norm": "auto" if keeps_final_norm else "no",
    }


def _norm(settings: Settings) -> NormConfig:
    return RmsNormConfig() if settings["decoder_use_rmsnorm"] else LayerNormConfig()


def _embedding(settings: Settings) -> PlainEmbedding | FactorizedEmbedding:
    tie: Literal["all", "decoder", "none"] = "decoder" if settings["share_decoder_input_output_embed"] else "none"
    tie = "all" if settings["share_all_embeddings"] else tie
    scale, norm, dim = (
        not settings["no_scale_embedding"],
        settings["layernorm_embedding"],
        settings["decoder_factorized_embed_dim"],
    )
    if not dim:
        return PlainEmbedding(scale=scale, norm=norm, tie=tie)
    activation = _activation("factorized_embed_activation_fn", settings["factorized_embed_activation_fn"] or "linear")
    return FactorizedEmbedding(scale=scale, norm=norm, tie=tie, dim=dim, activation=activation)
