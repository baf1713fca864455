"""The `model` and `adapter` sections of a recipe from fairseq's options, of a checkpoint or a command line. Torch-free.

A checkpoint is read faithfully: its model computes the same as fairseq's code, bugs of positions included, and a setting that
dstrain cannot represent is refused by name. A command line is read as its options say, with a note on every difference.

Two generations of the fork share option names. The earlier has `type` in `rope_args` and rotates whole heads by halves; the later
has `theta` and rotates the first half of each head in neighboring pairs. ALiBi of the earlier never reached the encoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dstrain.config_base import Tree
from dstrain.interop.fairseq.names import target_patterns
from dstrain.interop.fairseq.options import Settings, SettingsReader, dashed
from dstrain.log import logger
from dstrain.models.config import Activation

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
EQUAL = {
    "embed_dim": "model.model_dim is one number",
    "normalize_before": "model.norm_order is one for both sides",
    "use_rmsnorm": "model.norm is one for both sides",
    "learned_pos": "model.position is one for both sides",
}
"""Options that must agree between encoder and decoder, with the key that is one for both."""
ROPE_KEYS = {"type", "base", "theta", "max_position_embeddings", "scaling_factor"}
YARN_NUMBERS = {
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "extrapolation_factor": "extrapolation_factor",
    "attn_factor": "attention_factor",
}
YARN_KEYS = {"type", "base", "scale", "max_position_embeddings", "original_max_position_embeddings", "finetuned", *YARN_NUMBERS}
ALIBI_KEYS = {"type", "alibi_asymmetrical"}
LORA_DEFAULTS: Mapping[str, Any] = {
    "r": 0,
    "alpha": 1,
    "dropout": 0.0,
    "rank_scaled": False,
    "target_modules": "",
    "bias": "none",
}


def model_section(settings: Settings, reading: SettingsReader) -> Tree:
    """The architecture, as plain values. ImportFormatError names an option that cannot be read."""
    sides = ["decoder"] if settings.decoder_only else ["encoder", "decoder"]
    side = sides[0]
    if not settings.decoder_only:
        for name, reason in EQUAL.items():
            if settings[f"encoder_{name}"] != settings[f"decoder_{name}"]:
                reading.unequal(name, settings, reason)
    return {
        "kind": "decoder_only" if settings.decoder_only else "encoder_decoder",
        "model_dim": settings[f"{side}_embed_dim"],
        "norm_order": "pre" if settings[f"{side}_normalize_before"] else "post",
        "norm": {"kind": "rms_norm" if settings[f"{side}_use_rmsnorm"] else "layer_norm"},
        "activation": _activation("activation_fn", settings, reading),
        "position": _position(settings, side, reading),
        "embedding": _embedding(settings, sides, reading),
        **{name: _stack(settings, name, reading) for name in sides},
        "dropout": settings["dropout"],
        "attention_dropout": settings["attention_dropout"],
        "activation_dropout": settings["activation_dropout"],
        **_lengths(settings),
    }


def _stack(settings: Settings, side: str, reading: SettingsReader) -> Tree:
    """With recurrent stacking one layer runs that many times, whatever the number of layers is."""
    passes, groups = f"{side}_recurrent_stacking", f"{side}_kv_attention_heads"
    stack: Tree = {"depth": settings[passes] or settings[f"{side}_layers"]}
    if settings[passes]:
        stack["unique_layers"] = 1
        reading.differ(settings.shown(passes), "recurrent-stacking")
    stack |= {"num_heads": settings[f"{side}_attention_heads"], "ffn_dim": settings[f"{side}_ffn_embed_dim"]}
    grouped = "gqa" in (settings["attn_implementation"] or "")
    if settings[groups] and (grouped or not reading.faithful):
        stack["num_kv_heads"] = settings[groups]
    if settings[groups] and not grouped:
        reading.differ(settings.shown(groups), "kv-attention-heads")
    if settings[f"{side}_use_glu"]:
        stack["feed_forward"] = "gated"
        reading.differ(settings.shown(f"{side}_use_glu"), "use-glu")
    stack["layer_drop"] = settings[f"{side}_layerdrop"]
    if side == "decoder":
        if settings["no_decoder_final_norm"]:
            stack["final_norm"] = "no"
        if settings["decoder_output_activation_fn"]:
            stack["output_activation"] = _activation("decoder_output_activation_fn", settings, reading)
    return stack


def _embedding(settings: Settings, sides: list[str], reading: SettingsReader) -> Tree:
    """Token vectors and the vocabulary matrix. A projection between widths is a factorized embedding with a linear activation."""
    tie = "decoder" if settings["share_decoder_input_output_embed"] else "none"
    tie = "all" if settings["share_all_embeddings"] else tie
    tree: Tree = {"scale": not settings["no_scale_embedding"], "norm": settings["layernorm_embedding"], "tie": tie}
    if settings["decoder_output_dim"] != settings["decoder_embed_dim"]:
        tree["output_dim"] = settings["decoder_output_dim"]
    factorized = {side: settings[f"{side}_factorized_embed_dim"] for side in sides}
    projected = {side: settings[f"{side}_input_dim"] for side in sides}
    narrow = {side: projected[side] != settings[f"{side}_embed_dim"] for side in sides}
    if narrow["decoder"] and not settings.decoder_only and not reading.faithful:
        reading.differ(settings.shown("decoder_input_dim"), "input-dim")
        narrow["decoder"] = False
    dims = {side: factorized[side] or projected[side] for side in sides if factorized[side] or narrow[side]}
    if not dims:
        return {"kind": "plain", **tree}
    if len(set(dims.values())) > 1:
        reading.unequal("factorized_embed_dim", settings, "model.embedding.dim is one for both sides")
    if tie != "none" and any(factorized.values()):
        reading.differ(settings.shown(next(f"{side}_factorized_embed_dim" for side in dims)), "factorized")
    activation = _activation("factorized_embed_activation_fn", settings, reading) if any(factorized.values()) else "linear"
    if len(dims) < len(sides):
        tree["sides"] = "source" if "encoder" in dims else "target"
    return {"kind": "factorized", "dim": next(iter(dims.values())), "activation": activation, **tree}


def _activation(option: str, settings: Settings, reading: SettingsReader) -> Activation:
    name = settings[option]
    if name not in ACTIVATION_NAMES:
        raise reading.refusal(option, name, f"dstrain has no such activation; known are {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def _lengths(settings: Settings) -> dict[str, int]:
    if settings.decoder_only:
        limit = settings["max_target_positions"] if settings.has("max_target_positions") else settings["tokens_per_sample"]
        return {"max_target_length": limit or settings["max_target_positions"]}
    return {f"max_{side}_length": settings[f"max_{side}_positions"] for side in ("source", "target")}


def _position(settings: Settings, side: str, reading: SettingsReader) -> Tree:
    """The one kind of position that the model has. Given options go before those of the architecture."""
    names = ("rope_args", "yarn_args", "alibi_args")
    present = [name for name in names if settings.has(name)]
    values = {name: json_object(name, settings, reading) for name in present or names if settings[name] is not None}
    if len(present) > 1:
        raise reading.refusal(
            present[1], settings[present[1]], f"{' and '.join(map(dashed, present))} exclude one another; give one"
        )
    added = not settings["no_token_positional_embeddings"]
    if present and added:
        if not reading.faithful:
            reading.differ(dashed(present[0]), "positions-too")
        elif present == ["alibi_args"] and "type" not in values["alibi_args"]:
            values = {}  # the earlier generation applied ALiBi only without other positions
        else:
            raise reading.refusal(present[0], settings[present[0]], "positions are added to the embeddings, too")
    if "rope_args" in values:
        return _rotary(values["rope_args"], reading)
    if "yarn_args" in values:
        return _yarn(values["yarn_args"], reading)
    if "alibi_args" in values:
        return _alibi(values["alibi_args"], settings, reading)
    if not added:
        return {"kind": "none"}
    return {"kind": "learned" if settings[f"{side}_learned_pos"] else "sinusoidal"}


def json_object(name: str, settings: Settings, reading: SettingsReader) -> dict[str, Any]:
    """An option whose value is a JSON object; a command line's is parsed already."""
    value = settings[name]
    try:
        content = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise reading.refusal(name, value, f"it is no JSON object ({error})") from error
    if not isinstance(content, dict):
        raise reading.refusal(name, value, "it is no JSON object")
    return content


def _rotary(rope: Mapping[str, Any], reading: SettingsReader) -> Tree:
    reading.ignored("rope_args", rope, ROPE_KEYS)
    reading.differ("--rope-args", "decoding" if "type" in rope else "rope-late")
    factor = float(rope.get("scaling_factor", 1.0))
    tree: Tree = {"kind": "rotary", "theta": float(rope.get("theta", rope.get("base", 10000)))}
    if reading.faithful and "type" not in rope:
        tree |= {"fraction": 0.5, "layout": "interleaved"}
    match rope.get("type", "linear"):
        case "linear":
            scaling: Tree = {"kind": "linear", "factor": factor} if factor != 1 else {"kind": "none"}
        case "vanilla":
            scaling = {"kind": "none"}
        case "dynamic":
            scaling = {"kind": "dynamic_ntk", "original_length": int(rope.get("max_position_embeddings", 2048))}
            if "scaling_factor" in rope:
                reading.differ("--rope-args", "rope-dynamic")
        case kind:
            raise reading.refusal("rope_args", rope, f"its type {kind!r} is none of vanilla, linear, dynamic")
    return {**tree, "scaling": scaling}


def _yarn(yarn: Mapping[str, Any], reading: SettingsReader) -> Tree:
    reading.ignored("yarn_args", yarn, YARN_KEYS)
    reading.differ("--yarn-args", "decoding")
    original, longest = int(yarn.get("original_max_position_embeddings", 256)), int(yarn.get("max_position_embeddings", 2048))
    rotary: Tree = {"kind": "rotary", "theta": float(yarn.get("base", 10000))}
    match yarn.get("type"):
        case "vanilla" if "scale" not in yarn and not reading.faithful:
            reading.differ("--yarn-args", "yarn-plain", longest=longest, original=original, factor=longest / original)
            return {**rotary, "scaling": {"kind": "none"}}
        case "vanilla":
            scaling: Tree = {"kind": "yarn", "factor": float(yarn.get("scale", 1.0)), "original_length": original}
        case "dynamic":
            factor = max(1.0, longest / original) if yarn.get("finetuned") else 1.0
            scaling = {"kind": "dynamic_yarn", "factor": factor, "original_length": original, "from_length": longest}
            reading.differ("--yarn-args", "yarn-dynamic")
        case kind:
            raise reading.refusal("yarn_args", yarn, f"its type {kind!r} is none of vanilla, dynamic")
    scaling |= {key: float(yarn[name]) for name, key in YARN_NUMBERS.items() if name in yarn}
    if "beta_slow" not in yarn:
        reading.differ("--yarn-args", "yarn-slow")
        if reading.faithful:
            scaling["beta_slow"] = 2.0
            logger.warning(
                "yarn_args name no beta_slow: 2 is taken, the predecessor's default until 2024-06-11; from then on it was 1, so "
                "set model.position.scaling.beta_slow by hand if the model was trained later"
            )
    return {**rotary, "scaling": scaling}


def _alibi(alibi: Mapping[str, Any], settings: Settings, reading: SettingsReader) -> Tree:
    reading.ignored("alibi_args", alibi, ALIBI_KEYS)
    reading.differ("--alibi-args", "alibi-args")
    asymmetric = alibi.get("alibi_asymmetrical", alibi.get("type") == "asymmetrical")
    if isinstance(asymmetric, str):
        reading.differ("--alibi-args", "alibi-string", value=asymmetric)
        asymmetric = asymmetric.lower() == "true"
    if settings.decoder_only:
        return {"kind": "alibi"}
    encoder = "asymmetric" if asymmetric else "symmetric"
    if reading.faithful and "type" not in alibi:
        encoder = "none"
    return {"kind": "alibi", "encoder": encoder}


def adapter_section(settings: Settings, reading: SettingsReader) -> Tree | None:
    """Low-rank adapters of a command line, None without them."""
    if not settings.has("lora_args"):
        return None
    lora = json_object("lora_args", settings, reading)
    reading.ignored("lora_args", lora, set(LORA_DEFAULTS))
    lora = {**LORA_DEFAULTS, **lora}
    names = [name.strip() for name in str(lora["target_modules"] or "").split(",") if name.strip()]
    if not lora["r"] or not names:
        reason = f"r = {lora['r']!r} and target_modules = {lora['target_modules']!r} make no adapter; give a rank and modules"
        raise reading.refusal("lora_args", settings["lora_args"], reason)
    reading.differ("--lora-args", "lora-args")
    reading.reads("--lora-args", "lora-base")
    return {**lora_settings(lora), "bias": lora["bias"], "targets": list(dict.fromkeys(_patterns(names)))}


def _patterns(names: list[str]) -> list[str]:
    return [pattern for name in names for pattern in target_patterns(name)]


def lora_settings(lora: Mapping[str, Any]) -> Tree:
    """The keys of our `adapter` section that fairseq has, too."""
    return {
        "kind": "lora",
        "rank": lora["r"],
        "alpha": lora["alpha"],
        "dropout": lora["dropout"],
        "rank_scaled": bool(lora["rank_scaled"]),
    }
